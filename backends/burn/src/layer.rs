//! The embedding module.

mod adapters;
mod merged;
mod parts;

use burn::module::{Module, Param, ParamGroup};
use burn::nn::Embedding;
use burn::tensor::{Gradients, Int, Tensor};
use trainable_tokens_core::{
    EmbeddingSource, Error as CoreError, LayerOptions, LookupPlan, OptimizerHook, RowOptimizer, StepReport,
    TokenRows, TokenSet, TrainableTokens as CoreLayer,
};

use self::merged::MergedRows;
use self::parts::State;
use crate::convert::unflatten;
use crate::ids::read_ids;
use crate::{BurnTable, Result, TiedHead, TokenAdapter};

/// An embedding of which only chosen rows train: takes the place of a [`burn::nn::Embedding`] in a module.
///
/// ```
/// # use burn::nn::EmbeddingConfig;
/// # use burn::tensor::{Device, Int, Tensor};
/// # use trainable_tokens_burn::TrainableTokens;
/// # fn main() -> trainable_tokens_burn::Result<()> {
/// # let device = Device::flex().autodiff();
/// let embed = EmbeddingConfig::new(32, 4).init(&device);
/// # let plain = embed.clone();
/// let embed = TrainableTokens::wrap(embed, &[5, 7])?;
/// # let ids = Tensor::<2, Int>::from_data([[1, 5], [7, 7]], &device);
/// # assert_eq!(embed.forward(ids.clone()).into_data(), plain.forward(ids).into_data());
/// # Ok(())
/// # }
/// ```
///
/// The table is frozen whatever it was before, and stays so: no gradient reaches it, even if the whole model is
/// unfrozen, and no `V x D` tensor is made by a step. The rows train in at least `f32`, also over a table of half
/// precision.
///
/// Train with [`step`](Self::step) and an optimizer of `trainable-tokens-core`, or with any of burn's: the rows are the only
/// parameter with a gradient.
///
/// # Adapters
///
/// Rows belong to adapters, by name; [`wrap`](Self::wrap) makes one, called `default`, and activates it. Several are active at
/// once ([`activate`](Self::activate)), or each example of a batch has its own ([`lookup_mixed`](Self::lookup_mixed)).
/// What is active is followed by every [`tied_head`](Self::tied_head). All of it means what it means in core's
/// [layer](CoreLayer).
///
/// # Records
///
/// A record of the module holds `base.weight` (the whole table), and for each adapter, by its place, `adapters.0.delta` (the
/// trained rows) and `adapters.0.ids` (their tokens, in order); for each merge that was not undone also `merges.0.rows` and
/// `merges.0.ids` (the rows that were overwritten). So a record carries its tokens with it: a module that loads it trains
/// those. `model.into_record_group(embed.row_params())` records the rows alone, which a model with the same table loads with
/// `allow_partial(true)`. Names, options and what is active are configuration and in no record. A record taken before the
/// embedding was wrapped is loaded before it is wrapped.
#[derive(Module, Debug)]
pub struct TrainableTokens {
    base: Embedding,
    adapters: Vec<TokenAdapter>,
    merges: Vec<MergedRows>,
    #[module(skip)]
    state: State,
}

impl TrainableTokens {
    /// Trains the rows `token_ids` of an embedding, from where they are. The order of the ids is that of the rows.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and those of [`BurnTable::new`].
    pub fn wrap(embedding: Embedding, token_ids: &[u32]) -> Result<Self> {
        let (base, table) = frozen(embedding)?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        Self::from_core(base, CoreLayer::new(table, tokens)?)
    }

    /// Trains the rows `token_ids` of an embedding, from given rows `[k, D]` and in their element type.
    ///
    /// # Errors
    ///
    /// Those of [`wrap`](Self::wrap), and for rows of another shape.
    pub fn with_rows(embedding: Embedding, token_ids: &[u32], rows: &TokenRows) -> Result<Self> {
        let (base, table) = frozen(embedding)?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        Self::from_core(base, CoreLayer::with_rows(table, tokens, rows)?)
    }

    /// Freezes an embedding, without any adapter.
    ///
    /// # Errors
    ///
    /// Those of [`BurnTable::new`].
    pub fn frozen(embedding: Embedding) -> Result<Self> {
        let (base, table) = frozen(embedding)?;
        Self::from_core(base, CoreLayer::frozen(table)?)
    }

    /// Sets the padding token and what becomes of looked-up rows.
    #[must_use]
    pub fn with_options(mut self, options: LayerOptions) -> Self {
        self.state.options = options;
        self
    }

    /// The rows of `input_ids` `[batch, sequence]`: their shape with `D` appended, in the table's element type. The
    /// ids are read to the host once and checked there; ids that are there already need not be sent away, see
    /// [`plan`](Self::plan).
    ///
    /// # Errors
    ///
    /// For an id that is negative or out of range, and when burn fails.
    pub fn lookup(&self, input_ids: Tensor<2, Int>) -> Result<Tensor<3>> {
        let shape = self.shape_of(&input_ids);
        let plan = self.plan(&read_ids(input_ids, self.vocab_size())?)?;
        Ok(unflatten(self.lookup_planned(&plan)?, shape))
    }

    /// As [`lookup`](Self::lookup), in burn's habit.
    ///
    /// # Panics
    ///
    /// Where [`lookup`](Self::lookup) has an error.
    #[expect(clippy::panic, reason = "burn's layers panic on tensors that do not fit")]
    pub fn forward(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        self.lookup(input_ids).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`lookup`](Self::lookup), where each of the `batch` examples sees the rows of the adapter of its name, or the
    /// base's alone. The adapters need not be active.
    ///
    /// # Errors
    ///
    /// Those of [`lookup`](Self::lookup) and of core's [`lookup_mixed`](CoreLayer::lookup_mixed); unless there is one name or
    /// none for each example.
    pub fn lookup_mixed(&self, input_ids: Tensor<2, Int>, adapters: &[Option<&str>]) -> Result<Tensor<3>> {
        let shape = self.shape_of(&input_ids);
        check_adapters(shape[0], adapters)?;
        let plan = self.plan_mixed(&read_ids(input_ids, self.vocab_size())?, adapters)?;
        Ok(unflatten(self.lookup_planned(&plan)?, shape))
    }

    /// Plans a batch of flattened `input_ids`, for [`lookup_planned`](Self::lookup_planned).
    ///
    /// # Errors
    ///
    /// For an id out of range.
    pub fn plan(&self, input_ids: &[u32]) -> Result<LookupPlan> {
        Ok(self.core()?.plan(input_ids)?)
    }

    /// Plans a batch of `adapters.len()` equally long examples, flattened, each of which sees the rows of the adapter of its
    /// name, or the base's alone.
    ///
    /// # Errors
    ///
    /// Those of core's [`plan_mixed`](CoreLayer::plan_mixed).
    pub fn plan_mixed(&self, input_ids: &[u32], adapters: &[Option<&str>]) -> Result<LookupPlan> {
        Ok(self.core()?.plan_mixed(input_ids, adapters)?)
    }

    /// The rows of a planned batch: `[N, D]` in the table's element type.
    ///
    /// # Errors
    ///
    /// If the plan was made for other tokens; those of core's [`lookup_planned`](CoreLayer::lookup_planned).
    pub fn lookup_planned(&self, plan: &LookupPlan) -> Result<Tensor<2>> {
        self.core()?.lookup_planned(plan)
    }

    /// A head that shares this layer's table and rows; see there.
    pub fn tied_head(&self) -> TiedHead<'_> {
        TiedHead::new(self)
    }

    /// The frozen embedding, as it is now (merged or not).
    pub fn embedding(&self) -> &Embedding {
        &self.base
    }

    /// The tokens whose rows outputs are made with: those of the active adapters that are not merged, or of all active ones
    /// if none is left. For a single adapter they are its own, in slot order.
    ///
    /// # Errors
    ///
    /// For tokens of a loaded record that are out of range or given twice.
    pub fn tokens(&self) -> Result<TokenSet> {
        Ok(self.core()?.tokens().clone())
    }

    /// Padding, scale and the like.
    pub fn options(&self) -> LayerOptions {
        self.state.options
    }

    /// The trained rows of the one active adapter as burn's parameter, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`NotOneActive`](trainable_tokens_core::Error::NotOneActive).
    pub fn delta(&self) -> Result<&Param<Tensor<2>>> {
        let adapter = self.active_at()?;
        Ok(self.adapters[adapter].delta())
    }

    /// The rows of all adapters and their ids as a group of parameters, for records of what was trained.
    pub fn row_params(&self) -> ParamGroup {
        let params = self.adapters.iter().flat_map(TokenAdapter::param_ids);
        ParamGroup::from_ids(params.collect())
    }

    /// Copies the trained rows of the one active adapter to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// [`NotOneActive`](trainable_tokens_core::Error::NotOneActive); when burn fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.active_adapter()?.rows()
    }

    /// Replaces the trained rows of the one active adapter, converted to their element type.
    ///
    /// # Errors
    ///
    /// [`NotOneActive`](trainable_tokens_core::Error::NotOneActive); for rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.change(|layer| layer.set_rows(rows))
    }

    /// The gradient of the trained rows of the one active adapter, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`NotOneActive`](trainable_tokens_core::Error::NotOneActive); those of [`AdapterRef::gradient`](crate::AdapterRef::gradient).
    pub fn gradient(&self, gradients: &Gradients) -> Result<TokenRows> {
        self.active_adapter()?.gradient(gradients)
    }

    /// One optimizer step on the rows of the one active adapter, with hooks before and after.
    ///
    /// # Errors
    ///
    /// As [`gradient`](Self::gradient); while merged; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &Gradients,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.change(|layer| layer.step(gradients, optimizer, hooks))
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// [`NotOneActive`](trainable_tokens_core::Error::NotOneActive); for a gradient of another shape; while merged; those of
    /// the optimizer and the hooks.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.change(|layer| layer.step_with(gradient, optimizer, hooks))
    }

    /// Gives the table back as burn's own embedding, as it is now (merged or not) and still frozen.
    pub fn into_embedding(self) -> Embedding {
        self.base
    }

    pub(crate) fn vocab_size(&self) -> usize {
        let [vocab_size, _] = self.base.weight.shape().dims();
        vocab_size
    }

    /// The shape of the rows of `input_ids`.
    fn shape_of(&self, input_ids: &Tensor<2, Int>) -> [usize; 3] {
        let [batch, sequence] = input_ids.dims();
        let [_, dim] = self.base.weight.shape().dims();
        [batch, sequence, dim]
    }
}

/// An embedding that does not train, and its table.
fn frozen(embedding: Embedding) -> Result<(Embedding, BurnTable)> {
    let base = embedding.materialize().no_grad();
    let table = BurnTable::new(base.weight.val())?;
    Ok((base, table))
}

/// Refuses names that are not one for each example.
pub(crate) fn check_adapters(examples: usize, adapters: &[Option<&str>]) -> Result<()> {
    if examples == adapters.len() {
        return Ok(());
    }
    Err(CoreError::shape("adapters of a mixed batch", &[examples], &[adapters.len()]).into())
}

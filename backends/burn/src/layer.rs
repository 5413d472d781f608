//! The embedding module.

use std::sync::Arc;

use burn::module::{Module, Param, ParamGroup, ParamId};
use burn::nn::Embedding;
use burn::tensor::{Gradients, Int, Tensor};
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, LayerOptions, LookupPlan, OptimizerHook,
    RowOptimizer, StepReport, TokenRows, TokenSet, WriteRows, step_delta,
};

use crate::convert::{to_indices, to_rows, to_tensor, unflatten};
use crate::ids::{TokenCache, read_ids};
use crate::ops::{Overrides, lookup_rows};
use crate::{Burn, BurnDelta, BurnTable, Result, TiedHead};

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
/// # Records
///
/// A record of the module holds `base.weight` (the whole table), `delta` (the trained rows) and `ids` (their tokens, in
/// order), and while it is merged also `merged` (the rows that were overwritten). So a record carries its tokens with it: a
/// module that loads it trains those. `model.into_record_group(embed.row_params())` records the rows alone, which a model
/// with the same table loads with `allow_partial(true)`. Options are configuration and are in no record. A record taken
/// before the embedding was wrapped is loaded before it is wrapped.
#[derive(Module, Debug)]
pub struct TrainableTokens {
    base: Embedding,
    delta: Param<Tensor<2>>,
    ids: Param<Tensor<1, Int>>,
    merged: Option<Param<Tensor<2>>>,
    #[module(skip)]
    options: LayerOptions,
    #[module(skip)]
    tokens: TokenCache,
}

impl TrainableTokens {
    /// Trains the rows `token_ids` of an embedding, from where they are. The order of the ids is that of the rows.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and those of [`BurnTable::new`].
    pub fn wrap(embedding: Embedding, token_ids: &[u32]) -> Result<Self> {
        let base = embedding.materialize().no_grad();
        let table = BurnTable::new(base.weight.val())?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        let rows = table.read_rows(tokens.ids())?;
        let rows = rows.to_dtype(table.dtype().default_row_dtype());
        Self::from_parts(base, tokens, &rows)
    }

    /// Trains the rows `token_ids` of an embedding, from given rows `[k, D]` and in their element type.
    ///
    /// # Errors
    ///
    /// Those of [`wrap`](Self::wrap), and for rows of another shape.
    pub fn with_rows(embedding: Embedding, token_ids: &[u32], rows: &TokenRows) -> Result<Self> {
        let base = embedding.materialize().no_grad();
        let table = BurnTable::new(base.weight.val())?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        rows.expect_shape("trained rows", tokens.len(), table.embedding_dim())?;
        Self::from_parts(base, tokens, rows)
    }

    fn from_parts(base: Embedding, tokens: TokenSet, rows: &TokenRows) -> Result<Self> {
        let device = base.weight.val().device();
        let ids = Param::initialized(ParamId::new(), to_indices(&tokens.to_vec(), &device));
        Ok(Self {
            base,
            delta: BurnDelta::new(rows, &device)?.into_param(),
            tokens: TokenCache::new(&ids, tokens),
            ids,
            merged: None,
            options: LayerOptions::default(),
        })
    }

    /// Sets the padding token and what becomes of looked-up rows.
    #[must_use]
    pub fn with_options(self, options: LayerOptions) -> Self {
        Self { options, ..self }
    }

    /// The rows of `input_ids` `[batch, sequence]`: their shape with `D` appended, in the table's element type. The
    /// ids are read to the host once and checked there; ids that are there already need not be sent away, see
    /// [`plan`](Self::plan).
    ///
    /// # Errors
    ///
    /// For an id that is negative or out of range, and when burn fails.
    pub fn lookup(&self, input_ids: Tensor<2, Int>) -> Result<Tensor<3>> {
        let [batch, sequence] = input_ids.dims();
        let [vocab_size, dim] = self.base.weight.shape().dims();
        let plan = self.plan(&read_ids(input_ids, vocab_size)?)?;
        Ok(unflatten(self.lookup_planned(&plan)?, [batch, sequence, dim]))
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

    /// Plans a batch of flattened `input_ids`, for [`lookup_planned`](Self::lookup_planned).
    ///
    /// # Errors
    ///
    /// For an id out of range.
    pub fn plan(&self, input_ids: &[u32]) -> Result<LookupPlan> {
        Ok(LookupPlan::new(&*self.tokens()?, self.options, input_ids)?)
    }

    /// The rows of a planned batch: `[N, D]` in the table's element type.
    ///
    /// # Errors
    ///
    /// If the plan was made for another layer.
    pub fn lookup_planned(&self, plan: &LookupPlan) -> Result<Tensor<2>> {
        let table = self.table()?;
        let delta = self.active()?.map(Param::val);
        lookup_rows(
            &table,
            delta.as_ref(),
            plan,
            self.options.transform(table.dtype()),
        )
    }

    /// A head that shares this layer's table and rows; see there.
    pub fn tied_head(&self) -> TiedHead<'_> {
        TiedHead::new(self)
    }

    /// The frozen embedding, as it is now (merged or not).
    pub fn embedding(&self) -> &Embedding {
        &self.base
    }

    /// The trainable tokens, in slot order.
    ///
    /// # Errors
    ///
    /// For tokens of a loaded record that are out of range or given twice.
    pub fn tokens(&self) -> Result<Arc<TokenSet>> {
        let [vocab_size, _] = self.base.weight.shape().dims();
        self.tokens.get(&self.ids, vocab_size)
    }

    /// Padding, scale and the like.
    pub fn options(&self) -> LayerOptions {
        self.options
    }

    /// The trained rows as burn's parameter, `[k, D]`.
    pub fn delta(&self) -> &Param<Tensor<2>> {
        &self.delta
    }

    /// The rows and their ids as a group of parameters, for records of what was trained.
    pub fn row_params(&self) -> ParamGroup {
        ParamGroup::from_ids(vec![self.delta.id, self.ids.id])
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When burn fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.store()?.read()
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.expect_unmerged()?;
        let mut store = self.store()?;
        store.write(&rows.to_dtype(store.dtype()))?;
        self.delta = store.into_param();
        Ok(())
    }

    /// The gradient of the trained rows, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`CoreError::NoGradient`] if the backward pass did not reach the rows: the loss does not depend on them, the graph
    /// is cut, or the layer is merged.
    pub fn gradient(&self, gradients: &Gradients) -> Result<TokenRows> {
        let store = self.store()?;
        if store.num_rows() == 0 {
            return store.read();
        }
        Burn::gradient(gradients, &store)?.ok_or_else(|| CoreError::NoGradient.into())
    }

    /// One optimizer step on the rows, with hooks before and after.
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
        self.step_with(self.gradient(gradients)?, optimizer, hooks)
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// For a gradient of another shape; while merged; those of the optimizer and the hooks.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.expect_unmerged()?;
        let mut store = self.store()?;
        let report = step_delta(optimizer, hooks, &*self.tokens()?, &mut store, gradient)?;
        self.delta = store.into_param();
        Ok(report)
    }

    /// Writes the rows into the table, rounded to its element type; the old rows are kept for
    /// [`unmerge`](Self::unmerge). From then on this layer and its head use the table alone.
    ///
    /// The table is written in place if this layer holds the only handle on it. If other modules share it, the layer gets a
    /// copy of its own first, and the others keep the old rows: burn's tensors are values. [`embedding`](Self::embedding)
    /// is the merged one, to be given to them.
    ///
    /// # Errors
    ///
    /// If it is merged already, or burn fails.
    pub fn merge(&mut self) -> Result<()> {
        self.expect_unmerged()?;
        let table = self.table()?;
        let rows = self.rows()?.to_dtype(table.dtype());
        let old = table.read_rows(self.tokens()?.ids())?;
        let old = to_tensor("overwritten rows", &old, &table.tensor().device())?;
        drop(table);
        self.overwrite(&rows)?;
        self.merged = Some(Param::initialized(ParamId::new(), old));
        Ok(())
    }

    /// Restores the exact rows that [`merge`](Self::merge) overwrote.
    ///
    /// # Errors
    ///
    /// If it is not merged, or burn fails.
    pub fn unmerge(&mut self) -> Result<()> {
        let old = self.merged.as_ref().ok_or(CoreError::NotMerged)?;
        self.overwrite(&to_rows("overwritten rows", old.val())?)?;
        self.merged = None;
        Ok(())
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Gives the table back as burn's own embedding, as it is now (merged or not) and still frozen.
    pub fn into_embedding(self) -> Embedding {
        self.base
    }

    /// The frozen table; a handle, not a copy.
    pub(crate) fn table(&self) -> Result<BurnTable> {
        BurnTable::new(self.base.weight.val())
    }

    /// The delta and its columns for a head, unless the table already holds them or there are none.
    pub(crate) fn overrides(&self) -> Result<Option<Overrides>> {
        let Some(delta) = self.active()? else {
            return Ok(None);
        };
        Ok(Some(Overrides::new(delta.val(), &*self.tokens()?)))
    }

    fn active(&self) -> Result<Option<&Param<Tensor<2>>>> {
        Ok((!self.is_merged() && !self.tokens()?.is_empty()).then_some(&self.delta))
    }

    fn store(&self) -> Result<BurnDelta> {
        BurnDelta::from_param(self.delta.clone())
    }

    fn expect_unmerged(&self) -> Result<()> {
        if self.is_merged() {
            return Err(CoreError::AlreadyMerged.into());
        }
        Ok(())
    }

    /// Writes rows of the table, in place if no other handle is left.
    fn overwrite(&mut self, rows: &TokenRows) -> Result<()> {
        let (tokens, device) = (self.tokens()?, self.table()?.tensor().device());
        let nothing = Param::initialized(ParamId::new(), Tensor::zeros([1, 1], &device));
        let (id, tensor, mapper) = std::mem::replace(&mut self.base.weight, nothing).consume();
        let mut table = BurnTable::new(tensor)?;
        let written = table.write_rows(tokens.ids(), rows);
        self.base.weight = Param::from_mapped_value(id, table.into_tensor(), mapper);
        written
    }
}

//! The embedding layer.

mod adapters;

use std::mem;
use std::ops::Deref;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::{Embedding, Module};
use parking_lot::RwLockReadGuard;
use trainable_tokens_core::{
    EmbeddingSource, LayerOptions, LookupPlan, OptimizerHook, RowOptimizer, StepReport, TokenRows, TokenSet,
    TrainableTokens as CoreLayer,
};

use crate::ids::{expect_examples, read_ids};
use crate::ops::lookup_rows;
use crate::shared::Shared;
use crate::{Candle, CandleTable, Result, TiedHead};

/// An embedding of which only chosen rows train: takes the place of a [`candle_nn::Embedding`].
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{Module, VarBuilder, VarMap};
/// # use trainable_tokens_candle::TrainableTokens;
/// # fn main() -> candle_core::Result<()> {
/// # let (v, d, vars) = (32, 4, VarMap::new());
/// # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let embed = candle_nn::embedding(v, d, vb)?;
/// # let plain = embed.clone();
/// let embed = TrainableTokens::wrap(embed, &[5, 7])?;
/// # let ids = Tensor::new(&[[1i64, 5], [7, 7]], &Device::Cpu)?;
/// # assert_eq!(embed.forward(&ids)?.to_vec3::<f32>()?, plain.forward(&ids)?.to_vec3::<f32>()?);
/// # Ok(())
/// # }
/// ```
///
/// The table is frozen whatever it was before: it is detached, so that no gradient reaches it and no `V x D` tensor
/// is made by a step. The rows train in at least `f32`, also over a table of half precision.
///
/// Train with [`step`](Self::step) and an optimizer of `trainable-tokens-core`, or hand [`var`](Self::var) to an
/// optimizer of candle's. [`merge`](Self::merge) writes the rows into the table **in place**: everything that shares
/// the table's storage sees them.
///
/// # Adapters
///
/// The rows belong to an adapter, `default`. [`add_adapter`](Self::add_adapter) adds others by name, of which one or
/// several are active at a time, or another one for each example of a batch:
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::Module;
/// # use trainable_tokens_candle::TrainableTokens;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let table = Tensor::zeros((32, 4), DType::F32, &Device::Cpu)?;
/// # let ids = Tensor::new(&[[1u32, 5], [7, 9], [9, 5]], &Device::Cpu)?;
/// let mut embed = TrainableTokens::from_tensor(table, &[5, 7])?;
/// embed.add_adapter("names", &[9])?;
///
/// embed.activate(&["default", "names"])?;
/// embed.forward(&ids)?;
///
/// let head = embed.tied_head();
/// let rows = embed.lookup_mixed(&ids, &[Some("default"), None, Some("names")])?;
/// head.logits_mixed(&rows, &[Some("default"), None, Some("names")])?;
/// # Ok(())
/// # }
/// ```
///
/// Methods about *the* rows, such as [`rows`](Self::rows) and [`step`](Self::step), are about the one active adapter;
/// [`adapter`](Self::adapter) and [`adapter_mut`](Self::adapter_mut) are about any. All words are those of core's
/// [`TrainableTokens`](CoreLayer), which [`layer`](Self::layer) lends.
#[derive(Debug)]
pub struct TrainableTokens {
    layer: Shared,
}

impl TrainableTokens {
    /// Trains the rows `token_ids` of an embedding, from where they are. The order of the ids is that of the rows.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and those of [`CandleTable::new`].
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the layer takes the embedding's place"
    )]
    pub fn wrap(embedding: Embedding, token_ids: &[u32]) -> Result<Self> {
        Self::from_tensor(embedding.embeddings().clone(), token_ids)
    }

    /// Trains the rows `token_ids` of a table `[V, D]`, from where they are.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and those of [`CandleTable::new`].
    pub fn from_tensor(table: Tensor, token_ids: &[u32]) -> Result<Self> {
        let table = CandleTable::new(table)?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        Ok(Self::from_layer(CoreLayer::new(table, tokens)?))
    }

    /// Trains the rows `token_ids` of a table `[V, D]`, from given rows `[k, D]` and in their element type.
    ///
    /// # Errors
    ///
    /// Those of [`from_tensor`](Self::from_tensor), and for rows of another shape.
    pub fn with_rows(table: Tensor, token_ids: &[u32], rows: &TokenRows) -> Result<Self> {
        let table = CandleTable::new(table)?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        Ok(Self::from_layer(CoreLayer::with_rows(table, tokens, rows)?))
    }

    /// Starts without any adapter over a table `[V, D]`.
    ///
    /// # Errors
    ///
    /// Those of [`CandleTable::new`].
    pub fn frozen(table: Tensor) -> Result<Self> {
        Ok(Self::from_layer(CoreLayer::frozen(CandleTable::new(table)?)?))
    }

    pub(crate) fn from_layer(layer: CoreLayer<Candle>) -> Self {
        let layer = Shared::new(layer);
        Self { layer }
    }

    /// Sets the padding token, the scale of looked-up rows and the other options.
    #[must_use]
    pub fn with_options(mut self, options: LayerOptions) -> Self {
        let mut layer = self.layer.write();
        // There is a layer over the table already, so that this cannot fail.
        if let Ok(stand_in) = CoreLayer::frozen(layer.source().clone()) {
            *layer = mem::replace(&mut *layer, stand_in).with_options(options);
        }
        drop(layer);
        self
    }

    /// The rows of `input_ids`, of any integer type, shape, layout and device: their shape with `D` appended, in the
    /// table's element type. The ids are read to the host once and checked there. [`Module::forward`] is the same with
    /// candle's error.
    ///
    /// # Errors
    ///
    /// For an id that is negative or out of range, for ids that are not integers, and when candle fails.
    pub fn lookup(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.lookup_by(input_ids, CoreLayer::plan)
    }

    /// The rows of a mixed batch of `input_ids` `[B, ..]`: each of its `B` examples sees the rows of the adapter of its
    /// name, active or not, or the base's alone.
    ///
    /// # Errors
    ///
    /// As [`lookup`](Self::lookup); if there are not `B` names, for an unknown one, and while the layer is merged or
    /// disabled.
    pub fn lookup_mixed(&self, input_ids: &Tensor, adapters: &[Option<&str>]) -> Result<Tensor> {
        expect_examples("input_ids of a mixed batch", input_ids.dims(), adapters)?;
        self.lookup_by(input_ids, |layer, ids| layer.plan_mixed(ids, adapters))
    }

    /// The rows come out in the shape of the ids: to reshape them would cost the backward pass two more gradients.
    fn lookup_by(
        &self,
        input_ids: &Tensor,
        plan: impl FnOnce(&CoreLayer<Candle>, &[u32]) -> trainable_tokens_core::Result<LookupPlan>,
    ) -> Result<Tensor> {
        let layer = self.layer.read();
        let table = layer.source();
        let plan = plan(&layer, &read_ids(input_ids, table.vocab_size())?)?;
        let rows = layer.rows_for(&plan)?;
        let shape = [input_ids.dims(), &[table.embedding_dim()]].concat();
        let plan = Arc::new(plan);
        lookup_rows(table, rows.as_deref(), &plan, layer.transform(), shape.into())
    }

    /// A head that shares this layer; see there.
    pub fn tied_head(&self) -> TiedHead {
        TiedHead::new(self.layer.clone())
    }

    /// Core's layer, to read; also for code that is generic over backends.
    pub fn layer(&self) -> impl Deref<Target = CoreLayer<Candle>> {
        self.layer.read()
    }

    /// The frozen table.
    pub fn table(&self) -> impl Deref<Target = CandleTable> {
        RwLockReadGuard::map(self.layer.read(), CoreLayer::source)
    }

    /// The trainable tokens, in slot order. For several active adapters see [`CoreLayer::tokens`].
    pub fn tokens(&self) -> impl Deref<Target = TokenSet> {
        RwLockReadGuard::map(self.layer.read(), CoreLayer::tokens)
    }

    /// The trained rows of the one active adapter as candle's variable, `[k, D]`.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active.
    pub fn var(&self) -> Result<Var> {
        self.layer.read().delta()?.var().cloned()
    }

    /// Copies the trained rows of the one active adapter to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active, or candle fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.layer.read().rows()
    }

    /// Replaces the trained rows of the one active adapter, converted to their element type.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active, for rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.active_adapter_mut()?.set_rows(rows)
    }

    /// The gradient of the trained rows of the one active adapter, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`trainable_tokens_core::Error::NoGradient`] if the backward pass did not reach the rows: the loss does not
    /// depend on them, the graph is cut (candle's fused norms, softmax and rotary embeddings cut it), or the layer is
    /// merged. If not exactly one adapter is active.
    pub fn gradient(&self, gradients: &GradStore) -> Result<TokenRows> {
        self.layer.read().gradient(gradients)
    }

    /// One optimizer step on the rows of the one active adapter, with hooks before and after.
    ///
    /// # Errors
    ///
    /// As [`gradient`](Self::gradient); while merged; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.active_adapter_mut()?.step(gradients, optimizer, hooks)
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active; for a gradient of another shape; while merged; those of the optimizer and
    /// the hooks.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.active_adapter_mut()?.step_with(gradient, optimizer, hooks)
    }

    /// Gives the table back as candle's own embedding, as it is now (merged or not).
    pub fn into_embedding(self) -> Embedding {
        let table = self.table();
        Embedding::new(table.tensor().clone(), table.embedding_dim())
    }
}

impl Module for TrainableTokens {
    fn forward(&self, input_ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.lookup(input_ids)?)
    }
}

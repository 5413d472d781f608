//! The embedding layer.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::{Embedding, Module};
use trainable_tokens_core::{
    EmbeddingSource, LayerOptions, OptimizerHook, RowOptimizer, StepReport, TokenRows, TokenSet,
    TrainableTokens as CoreLayer,
};

use crate::head::Merged;
use crate::ids::read_ids;
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
#[derive(Debug)]
pub struct TrainableTokens {
    layer: CoreLayer<Candle>,
    merged: Merged,
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

    fn from_layer(layer: CoreLayer<Candle>) -> Self {
        let merged = Merged::default();
        Self { layer, merged }
    }

    /// Sets the padding token and the scale of looked-up rows.
    #[must_use]
    pub fn with_options(self, options: LayerOptions) -> Self {
        let layer = self.layer.with_options(options);
        Self { layer, ..self }
    }

    /// The rows of `input_ids`, of any integer type, shape, layout and device: their shape with `D` appended, in the
    /// table's element type. The ids are read to the host once and checked there. [`Module::forward`] is the same with
    /// candle's error.
    ///
    /// # Errors
    ///
    /// For an id that is negative or out of range, for ids that are not integers, and when candle fails.
    pub fn lookup(&self, input_ids: &Tensor) -> Result<Tensor> {
        let table = self.layer.source();
        let ids = read_ids(input_ids, table.vocab_size())?;
        let rows = self.layer.lookup(&ids)?;
        Ok(rows.reshape([input_ids.dims(), &[table.embedding_dim()]].concat())?)
    }

    /// A head that shares this layer's table and rows; see there.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn tied_head(&self) -> Result<TiedHead> {
        let layer = &self.layer;
        TiedHead::new(layer.source(), layer.delta(), layer.tokens(), &self.merged)
    }

    /// Core's layer, for code that is generic over backends.
    pub fn layer(&self) -> &CoreLayer<Candle> {
        &self.layer
    }

    /// The frozen table.
    pub fn table(&self) -> &CandleTable {
        self.layer.source()
    }

    /// The trainable tokens, in slot order.
    pub fn tokens(&self) -> &TokenSet {
        self.layer.tokens()
    }

    /// The trained rows as candle's variable, `[k, D]`.
    pub fn var(&self) -> &Var {
        self.layer.delta().var()
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.layer.rows()
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.layer.set_rows(rows)
    }

    /// The gradient of the trained rows, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`trainable_tokens_core::Error::NoGradient`] if the backward pass did not reach the rows: the loss does not
    /// depend on them, the graph is cut (candle's fused norms, softmax and rotary embeddings cut it), or the layer is
    /// merged.
    pub fn gradient(&self, gradients: &GradStore) -> Result<TokenRows> {
        self.layer.gradient(gradients)
    }

    /// One optimizer step on the rows, with hooks before and after.
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
        self.layer.step(gradients, optimizer, hooks)
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
        self.layer.step_with(gradient, optimizer, hooks)
    }

    /// Writes the rows into the table in place, rounded to its element type; the old rows are kept for
    /// [`unmerge`](Self::unmerge). From then on this layer and its heads use the table alone.
    ///
    /// # Errors
    ///
    /// If it is merged already, or candle fails.
    pub fn merge(&mut self) -> Result<()> {
        self.merged.set(true, || self.layer.merge())
    }

    /// Restores the exact rows that [`merge`](Self::merge) overwrote.
    ///
    /// # Errors
    ///
    /// If it is not merged, or candle fails.
    pub fn unmerge(&mut self) -> Result<()> {
        self.merged.set(false, || self.layer.unmerge())
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        self.layer.is_merged()
    }

    /// Gives the table back as candle's own embedding, as it is now (merged or not).
    pub fn into_embedding(self) -> Embedding {
        let table = self.layer.into_source();
        Embedding::new(table.tensor().clone(), table.embedding_dim())
    }
}

impl Module for TrainableTokens {
    fn forward(&self, input_ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.lookup(input_ids)?)
    }
}

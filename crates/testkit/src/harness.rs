//! What a backend tells the kit about itself.

use trainable_tokens_core::{
    Backend, CrossEntropyOptions, DType, LookupPlan, TokenRows, TrainableTokens, WriteRows,
};

/// The layer of a harness's backend.
pub type Layer<H> = TrainableTokens<<H as Harness>::Backend>;
/// The table of a harness's backend.
pub type Source<H> = <<H as Harness>::Backend as Backend>::Source;
/// The value of a harness's framework.
pub type Tensor<H> = <<H as Harness>::Backend as Backend>::Tensor;
/// What the backward pass of a harness's framework returns.
pub type Gradients<H> = <<H as Harness>::Backend as Backend>::Gradients;
/// The error of a harness's backend.
pub type Error<H> = <<H as Harness>::Backend as Backend>::Error;

/// A backend for tables of one element type, as the kit drives it: how to make its values and read them, and how its
/// framework runs a backward pass. Nothing of the method itself belongs here.
///
/// # Contract
///
/// 1. [`source`](Self::source), [`hidden`](Self::hidden) and [`read`](Self::read) copy bit for bit.
/// 2. [`backward`](Self::backward) is one backward pass of the framework's own over all outputs of the pass: it
///    adds nothing up and leaves nothing out itself.
pub trait Harness: 'static {
    /// The backend.
    type Backend: Backend<Source: WriteRows>;

    /// Element type of the tables that it makes, and of the values that come out of them.
    const DTYPE: DType;

    /// Makes a frozen table of `rows`, `[V, D]` of type [`DTYPE`](Self::DTYPE).
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn source(rows: &TokenRows) -> Result<Source<Self>, Error<Self>>;

    /// Makes hidden states for the head of `layer`, `[N, D]` of type [`DTYPE`](Self::DTYPE). They need no gradient.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn hidden(layer: &Layer<Self>, values: &TokenRows) -> Result<Tensor<Self>, Error<Self>>;

    /// Copies a value to the host.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn read(tensor: &Tensor<Self>) -> Result<TokenRows, Error<Self>>;

    /// Runs every lookup, head and loss of `pass` and then the framework's backward pass from the sum of all outputs, each
    /// element multiplied by its upstream gradient.
    ///
    /// # Errors
    ///
    /// Those of the layer and the framework.
    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error<Self>>;
}

/// What one forward and backward pass consists of.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Batches to look up, mixed ones among them, each with the gradient of its rows, `[N, D]` of the table's element type.
    pub lookups: Vec<(LookupPlan, TokenRows)>,
    /// Hidden states to project.
    pub heads: Vec<HeadPass>,
    /// Hidden states to take the loss of; none for a harness that leaves out the group `loss`.
    pub losses: Vec<LossPass>,
}

/// Hidden states that a head projects.
#[derive(Clone, Debug)]
pub struct HeadPass {
    /// The hidden states, `[N, D]` of the table's element type.
    pub hidden: TokenRows,
    /// The gradient of their logits, `[N, V]` of the table's element type.
    pub upstream: TokenRows,
    /// The adapter, or none, of each of equally many rows, for
    /// [`logits_mixed`](trainable_tokens_core::TrainableTokens::logits_mixed); absent for
    /// [`logits`](trainable_tokens_core::TrainableTokens::logits).
    pub adapters: Option<Vec<Option<String>>>,
}

/// Hidden states whose loss is taken, by [`linear_cross_entropy`](TrainableTokens::linear_cross_entropy).
#[derive(Clone, Debug)]
pub struct LossPass {
    /// The hidden states, `[N, D]` of the table's element type.
    pub hidden: TokenRows,
    /// A label for each of them.
    pub labels: Vec<i64>,
    /// How the loss is computed.
    pub options: CrossEntropyOptions,
    /// The gradient of the loss: a number that every element type holds exactly.
    pub upstream: f64,
}

impl HeadPass {
    /// Hidden states that all see the layer's active adapters.
    pub fn new(hidden: TokenRows, upstream: TokenRows) -> Self {
        let adapters = None;
        Self {
            hidden,
            upstream,
            adapters,
        }
    }

    /// The adapters as the layer takes them.
    pub fn adapters(&self) -> Option<Vec<Option<&str>>> {
        let adapters = self.adapters.as_ref()?;
        Some(adapters.iter().map(Option::as_deref).collect())
    }
}

/// What a backward pass gave.
pub struct PassGradients<H: Harness + ?Sized> {
    /// What the framework returned, for [`TokenAdapter::gradient`](trainable_tokens_core::TokenAdapter::gradient).
    pub gradients: Gradients<H>,
    /// The gradients of the hidden states of each of [`Pass::heads`] and then of each of [`Pass::losses`], `[N, D]`.
    pub hidden: Vec<TokenRows>,
}

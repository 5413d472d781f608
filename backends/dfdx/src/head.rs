//! The output layer that shares an embedding's table.

use dfdx::nn::{Module, NonMutableModule};
use dfdx::shapes::{Dim, HasShape, RealizeShapeTo, Shape};
use dfdx::tensor::{Cpu, Tape, Tensor};
use dfdx::tensor_ops::ReshapeTo;
use trainable_tokens_core::{
    EmbeddingSource, Error as CoreError, TokenAdapter, TokenSet, TrainableTokens as CoreLayer,
};

use crate::backend::head;
use crate::convert::{Matrix, at_runtime, dims};
use crate::ops::{join_rows, project, split_rows};
use crate::{Dfdx, DfdxDelta, DfdxDevice, DfdxElement, Error, Result};

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed
/// from the trained rows.
///
/// It borrows the [`TrainableTokens`](crate::TrainableTokens) that it came from, with its adapters, those that are
/// active and merges as they are at that moment; make it where it is used, it costs nothing.
///
/// - While the rows equal the base's, the logits equal those of the frozen head, bit for bit.
/// - The embedding's scale does not apply here; its padding rule neither.
/// - Gradients go to `hidden` and to the trained rows. The table gets none, as it would from dfdx's own product.
/// - A bias is used as it is and never trains.
/// - As a [`Module`] it takes hidden states `[N, D]` or `[B, N, D]`, or a pair of the latter and the adapter of each of the
///   `B` examples.
#[derive(Debug)]
pub struct TiedHead<'a, E: DfdxElement, D: DfdxDevice<E> = Cpu> {
    layer: &'a CoreLayer<Dfdx<E, D>>,
    bias: Option<Tensor<(usize,), E, D>>,
}

impl<'a, E: DfdxElement, D: DfdxDevice<E>> TiedHead<'a, E, D> {
    pub(crate) fn new(layer: &'a CoreLayer<Dfdx<E, D>>) -> Self {
        Self { layer, bias: None }
    }

    /// Adds a bias `[V]` to the logits. It is kept as it is: no gradient, and no change by merging.
    ///
    /// # Errors
    ///
    /// When it has another length, or dfdx fails.
    pub fn with_bias<S>(mut self, bias: Tensor<S, E, D>) -> Result<Self>
    where
        S: Shape<Concrete = [usize; 1]> + RealizeShapeTo<(usize,)>,
    {
        let expected = self.layer.source().vocab_size();
        let [got] = bias.shape().concrete();
        if expected != got {
            return Err(CoreError::shape("bias of the head", &[expected], &[got]).into());
        }
        self.bias = Some(bias.try_reshape_like(&(got,)).map_err(Error::dfdx)?);
        Ok(self)
    }

    /// The logits `[N, V]` of `hidden` `[N, D]`.
    ///
    /// # Errors
    ///
    /// When `hidden` has another width, or dfdx fails.
    pub fn logits<N: Dim, M: Dim, T: Tape<E, D>>(
        &self,
        hidden: Tensor<(N, M), E, D, T>,
    ) -> Result<Tensor<(N, usize), E, D, T>> {
        let num_rows = hidden.shape().0;
        let layer = self.layer;
        let rows = layer.active()?;
        let logits = self.logits_of(at_runtime(hidden)?, rows.as_deref(), layer.tokens())?;
        let vocab_size = dims(&logits)[1];
        logits
            .try_reshape_like(&(num_rows, vocab_size))
            .map_err(Error::dfdx)
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> TiedHead<'_, E, D> {
    /// The logits `[N, V]` of `hidden` `[N, D]`, the rows of `adapters.len()` equally long examples, each of which sees the
    /// rows of the adapter of its name, or the base's alone. The adapters need not be active.
    ///
    /// # Errors
    ///
    /// Those of [`logits`](Self::logits) and of core's [`logits_mixed`](CoreLayer::logits_mixed).
    pub fn logits_mixed<N: Dim, M: Dim, T: Tape<E, D>>(
        &self,
        hidden: Tensor<(N, M), E, D, T>,
        adapters: &[Option<&str>],
    ) -> Result<Tensor<(N, usize), E, D, T>> {
        let num_rows = hidden.shape().0;
        let parts = self.layer.mixed_parts(num_rows.size(), adapters)?;
        let (ranges, adapters): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let (hidden, none) = (
            at_runtime(hidden)?,
            TokenSet::new([], self.layer.source().vocab_size())?,
        );
        let logits = if ranges.is_empty() {
            self.logits_of(hidden, None, &none)?
        } else {
            let hidden = split_rows(hidden, &ranges)?.into_iter();
            let logits = hidden.zip(adapters).map(|(hidden, adapter)| {
                let tokens = adapter.map_or(&none, TokenAdapter::tokens);
                self.logits_of(hidden, adapter.map(TokenAdapter::delta), tokens)
            });
            join_rows(logits.collect::<Result<_>>()?)?
        };
        let vocab_size = dims(&logits)[1];
        logits
            .try_reshape_like(&(num_rows, vocab_size))
            .map_err(Error::dfdx)
    }

    fn logits_of<T: Tape<E, D>>(
        &self,
        hidden: Matrix<E, D, T>,
        rows: Option<&DfdxDelta<E, D>>,
        tokens: &TokenSet,
    ) -> Result<Matrix<E, D, T>> {
        let mut head = head(self.layer.source(), rows, tokens)?;
        head.bias = self.bias.as_ref();
        project(hidden, &head)
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> NonMutableModule for TiedHead<'_, E, D> {}

impl<N: Dim, M: Dim, E, D, T> Module<Tensor<(N, M), E, D, T>> for TiedHead<'_, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, hidden: Tensor<(N, M), E, D, T>) -> Result<Self::Output> {
        self.logits(hidden)
    }
}

impl<B: Dim, N: Dim, M: Dim, E, D, T> Module<Tensor<(B, N, M), E, D, T>> for TiedHead<'_, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, hidden: Tensor<(B, N, M), E, D, T>) -> Result<Self::Output> {
        flattened(hidden, |hidden| self.logits(hidden))
    }
}

impl<B: Dim, N: Dim, M: Dim, E, D, T> Module<(Tensor<(B, N, M), E, D, T>, &[Option<&str>])>
    for TiedHead<'_, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(
        &self,
        (hidden, adapters): (Tensor<(B, N, M), E, D, T>, &[Option<&str>]),
    ) -> Result<Self::Output> {
        check_adapters(hidden.shape().0, adapters)?;
        flattened(hidden, |hidden| self.logits_mixed(hidden, adapters))
    }
}

/// A value for each token of a batch.
type Deep<B, N, M, E, D, T> = Tensor<(B, N, M), E, D, T>;

/// Lets a head see all rows of a batch below each other.
fn flattened<B: Dim, N: Dim, M: Dim, E: DfdxElement, D: DfdxDevice<E>, T: Tape<E, D>>(
    hidden: Deep<B, N, M, E, D, T>,
    head: impl FnOnce(Matrix<E, D, T>) -> Result<Matrix<E, D, T>>,
) -> Result<Deep<B, N, usize, E, D, T>> {
    let (batch, len, width) = *hidden.shape();
    let flat = (batch.size() * len.size(), width.size());
    let logits = head(hidden.try_reshape_like(&flat).map_err(Error::dfdx)?)?;
    let shape = (batch, len, dims(&logits)[1]);
    logits.try_reshape_like(&shape).map_err(Error::dfdx)
}

/// Refuses names that are not one for each example.
pub(crate) fn check_adapters(examples: impl Dim, adapters: &[Option<&str>]) -> Result<()> {
    let (expected, got) = ([examples.size()], [adapters.len()]);
    if expected == got {
        return Ok(());
    }
    Err(CoreError::shape("adapters of a mixed batch", &expected, &got).into())
}

//! The output layer that shares an embedding's table.

use dfdx::nn::{Module, NonMutableModule};
use dfdx::shapes::{Dim, HasShape, RealizeShapeTo, Shape};
use dfdx::tensor::{Cpu, Tape, Tensor};
use dfdx::tensor_ops::ReshapeTo;
use trainable_tokens_core::{EmbeddingSource, Error as CoreError, TrainableTokens as CoreLayer};

use crate::backend::head;
use crate::convert::{at_runtime, dims};
use crate::ops::project;
use crate::{Dfdx, DfdxDevice, DfdxElement, Error, Result};

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed
/// from the trained rows.
///
/// It borrows the [`TrainableTokens`](crate::TrainableTokens) that it came from; make it where it is used, it costs
/// nothing.
///
/// - While the rows equal the base's, the logits equal those of the frozen head, bit for bit.
/// - The embedding's scale does not apply here; its padding rule neither.
/// - Gradients go to `hidden` and to the trained rows. The table gets none, as it would from dfdx's own product.
/// - A bias is used as it is and never trains.
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
        let mut head = head(layer.source(), layer.active(), layer.tokens())?;
        head.bias = self.bias.as_ref();
        let logits = project(at_runtime(hidden)?, &head)?;
        let vocab_size = dims(&logits)[1];
        logits
            .try_reshape_like(&(num_rows, vocab_size))
            .map_err(Error::dfdx)
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
        let (batch, len, width) = *hidden.shape();
        let flat = (batch.size() * len.size(), width.size());
        let logits = self.logits(hidden.try_reshape_like(&flat).map_err(Error::dfdx)?)?;
        let shape = (batch, len, dims(&logits)[1]);
        logits.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

//! The output layer that shares an embedding's table.

use burn::tensor::Tensor;
use trainable_tokens_core::{EmbeddingSource, Error as CoreError};

use crate::convert::unflatten;
use crate::ops::{check_like, project};
use crate::{Result, TrainableTokens};

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed from
/// the trained rows.
///
/// It borrows its [`TrainableTokens`], as burn's parameters are values: a head of its own would not see the next step.
///
/// - While the rows equal the base's, the logits equal those of the frozen head, bit for bit.
/// - The embedding's scale and norm limit do not apply here; its padding rule neither.
/// - Gradients go to `hidden` and to the trained rows, where burn adds them to those of the lookup.
/// - A bias is used as it is and never trains.
#[derive(Clone, Debug)]
pub struct TiedHead<'a> {
    layer: &'a TrainableTokens,
    bias: Option<Tensor<1>>,
}

impl<'a> TiedHead<'a> {
    pub(crate) fn new(layer: &'a TrainableTokens) -> Self {
        Self { layer, bias: None }
    }

    /// Adds a bias `[V]` to the logits. It gets no gradient, and merging does not change it.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's.
    pub fn with_bias(mut self, bias: Tensor<1>) -> Result<Self> {
        let table = self.layer.table()?;
        let (what, expected, got) = ("bias of the head", [table.vocab_size()], bias.dims());
        if expected != got {
            return Err(CoreError::shape(what, &expected, &got).into());
        }
        check_like(what, &bias, &table)?;
        self.bias = Some(bias.detach());
        Ok(self)
    }

    /// The logits `[.., V]` of `hidden` `[.., D]`, for any leading dimensions.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's.
    pub fn logits<const R: usize>(&self, hidden: Tensor<R>) -> Result<Tensor<R>> {
        let table = self.layer.table()?;
        let (mut dims, dim) = (hidden.dims(), table.embedding_dim());
        let Some((last, leading)) = dims.split_last_mut().filter(|(last, _)| **last == dim) else {
            return Err(CoreError::shape("hidden states of the head", &[dim], &hidden.dims()).into());
        };
        let num_ids: usize = leading.iter().product();
        *last = table.vocab_size();
        let hidden = if num_ids == 0 {
            Tensor::zeros([0, dim], (&hidden.device(), hidden.dtype()))
        } else {
            hidden.reshape([num_ids, dim])
        };
        let logits = project(hidden, &table, self.layer.overrides()?.as_ref())?;
        let logits = match &self.bias {
            Some(bias) => logits + bias.clone().unsqueeze(),
            None => logits,
        };
        Ok(unflatten(logits, dims))
    }

    /// As [`logits`](Self::logits), in burn's habit.
    ///
    /// # Panics
    ///
    /// Where [`logits`](Self::logits) has an error.
    #[expect(clippy::panic, reason = "burn's layers panic on tensors that do not fit")]
    pub fn forward<const R: usize>(&self, hidden: Tensor<R>) -> Tensor<R> {
        self.logits(hidden).unwrap_or_else(|error| panic!("{error}"))
    }
}

//! The output layer that shares an embedding's table.

use burn::tensor::{Int, Tensor};
use trainable_tokens_core::{CrossEntropyOptions, CrossEntropyPlan, EmbeddingSource, Error as CoreError};

use crate::backend::cross_entropy;
use crate::convert::unflatten;
use crate::ids::read_integers;
use crate::layer::check_adapters;
use crate::ops::check_like;
use crate::{Result, TrainableTokens};

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed from
/// the trained rows.
///
/// It borrows its [`TrainableTokens`] with its adapters, those that are active and merges as they are at that moment, as
/// burn's parameters are values: a head of its own would not see the next step.
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
        self.flattened(hidden, |hidden| self.layer.core()?.logits(hidden))
    }

    /// The logits `[B, .., V]` of `hidden` `[B, .., D]`, where each of the `B` examples sees the rows of the adapter of its
    /// name, or the base's alone. The adapters need not be active.
    ///
    /// # Errors
    ///
    /// Those of [`logits`](Self::logits) and of core's
    /// [`logits_mixed`](trainable_tokens_core::TrainableTokens::logits_mixed); unless there is one name or none for each example.
    pub fn logits_mixed<const R: usize>(
        &self,
        hidden: Tensor<R>,
        adapters: &[Option<&str>],
    ) -> Result<Tensor<R>> {
        check_adapters(hidden.dims()[0], adapters)?;
        self.flattened(hidden, |hidden| self.layer.core()?.logits_mixed(hidden, adapters))
    }

    /// The cross-entropy `[1]` of the logits of `hidden` `[.., D]` for `labels` `[..]`, one for each row: the id that it must
    /// predict, or one that is ignored and costs nothing.
    ///
    /// It is that of [`logits`](Self::logits) up to rounding, with the same gradients, in F32 (F64 for such a table). But
    /// there is never more than a chunk of logits at once, as the options say: loss and gradients are computed together,
    /// chunk by chunk, in this call. Gradients that nothing asks for are left out.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's; [`CoreError::LabelOutOfRange`]; [`CoreError::AllIgnored`]
    /// for the mean over no label.
    pub fn cross_entropy<const R: usize, const L: usize>(
        &self,
        hidden: Tensor<R>,
        labels: Tensor<L, Int>,
        options: CrossEntropyOptions,
    ) -> Result<Tensor<1>> {
        let (dims, of_labels) = (hidden.dims(), labels.dims());
        let (leading, dim) = (&dims[..R - 1], dims[R - 1]);
        if of_labels != *leading {
            return Err(CoreError::shape("labels", leading, &of_labels).into());
        }
        let layer = self.layer.core()?;
        let source = layer.source();
        let plan = CrossEntropyPlan::new(&read_integers(labels)?, source.vocab_size(), options)?;
        plan.expect_hidden([plan.num_rows(), dim], source.embedding_dim())?;
        let hidden = flatten(hidden, plan.num_rows(), dim);
        let rows = layer.active()?;
        let bias = self.bias.as_ref();
        cross_entropy(&hidden, source, rows.as_deref(), layer.tokens(), bias, &plan)
    }

    /// Lets `head` see all hidden states below each other, and adds the bias.
    fn flattened<const R: usize>(
        &self,
        hidden: Tensor<R>,
        head: impl FnOnce(Tensor<2>) -> Result<Tensor<2>>,
    ) -> Result<Tensor<R>> {
        let [vocab_size, dim] = self.layer.embedding().weight.shape().dims();
        let mut dims = hidden.dims();
        let Some((last, leading)) = dims.split_last_mut().filter(|(last, _)| **last == dim) else {
            return Err(CoreError::shape("hidden states of the head", &[dim], &hidden.dims()).into());
        };
        let num_ids: usize = leading.iter().product();
        *last = vocab_size;
        let logits = head(flatten(hidden, num_ids, dim))?;
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

/// `[num_rows, dim]` of as many elements. Burn's own `reshape` takes a size of 0 for one to keep.
fn flatten<const R: usize>(hidden: Tensor<R>, num_rows: usize, dim: usize) -> Tensor<2> {
    if num_rows == 0 {
        return Tensor::zeros([0, dim], (&hidden.device(), hidden.dtype()));
    }
    hidden.reshape([num_rows, dim])
}

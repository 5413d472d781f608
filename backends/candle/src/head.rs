//! The output layer that shares an embedding's table.

use candle_core::Tensor;
use candle_nn::Module;
#[cfg(doc)]
use trainable_tokens_core::Error as CoreError;
use trainable_tokens_core::{Backend, CrossEntropyOptions, CrossEntropyPlan, EmbeddingSource, TokenAdapter};

use crate::backend::{cross_entropy, logits};
use crate::ids::{expect_examples, read_labels};
use crate::linear::check_bias;
use crate::ops::{Passes, check_input};
use crate::shared::Shared;
use crate::{Candle, Error, Result};

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed
/// from the trained rows.
///
/// It shares the layer that it came from, so that at every moment it has that layer's adapters, the active ones, whether
/// they are enabled, and what is merged. The [`TrainableTokens`](crate::TrainableTokens) may be stepped, and its adapters
/// changed, while the head exists. Calls of a head wait while a merge is under way.
///
/// - While the rows equal the base's, the logits equal those of the frozen head, bit for bit.
/// - The embedding's scale does not apply here; its padding rule neither.
/// - Gradients go to `hidden` and to the trained rows, where candle adds them to those of the embedding's lookup.
/// - A bias is used as it is and never trains.
///
/// A head that is not tied, but of which some rows train too, is the head of a layer of its own:
/// `TrainableTokens::from_tensor(head_weight, &ids)?.tied_head()`.
#[derive(Clone, Debug)]
pub struct TiedHead {
    layer: Shared,
    bias: Option<Tensor>,
}

impl TiedHead {
    pub(crate) fn new(layer: Shared) -> Self {
        Self { layer, bias: None }
    }

    /// Adds a bias `[V]` to the logits. It is kept as it is: no gradient, and no change by merging.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's.
    pub fn with_bias(mut self, bias: &Tensor) -> Result<Self> {
        self.bias = Some(check_bias(bias, self.layer.read().source().tensor())?);
        Ok(self)
    }

    /// Rows of the table: the last dimension of the logits.
    pub fn vocab_size(&self) -> usize {
        self.layer.read().source().vocab_size()
    }

    /// The logits `[.., V]` of `hidden` `[.., D]`, for any leading dimensions and layout. [`Module::forward`] is the
    /// same with candle's error.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's, or candle fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let layer = self.layer.read();
        let rows = layer.active()?;
        let trained = rows.as_deref().map(|rows| (rows, layer.tokens()));
        logits(hidden, layer.source(), trained, self.bias.as_ref())
    }

    /// The cross-entropy `[]` of the logits of `hidden` `[.., D]` for `labels` `[..]` of any integer type, one for each row:
    /// the id that it must predict, or one that is ignored and costs nothing.
    ///
    /// It is that of [`logits`](Self::logits) up to rounding, with the same gradients, in `f32` (`f64` for such a table).
    /// But loss and gradients are computed together, in this call, and there is never more than a chunk of logits at once,
    /// 128 MiB unless the options say otherwise. On the CPU it is far less: a block of rows and columns for each thread.
    /// Gradients that nothing asks for (of `hidden` without a graph) are left out.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's; [`CoreError::LabelOutOfRange`]; [`CoreError::AllIgnored`]
    /// for the mean over no label; when candle fails.
    pub fn cross_entropy(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
    ) -> Result<Tensor> {
        self.loss(hidden, labels, options, Passes::Both)
    }

    /// As [`cross_entropy`](Self::cross_entropy), but detached: at less than half of the cost, for evaluation.
    ///
    /// # Errors
    ///
    /// Those of [`cross_entropy`](Self::cross_entropy).
    pub fn evaluate_cross_entropy(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
    ) -> Result<Tensor> {
        self.loss(hidden, labels, options, Passes::Forward)
    }

    fn loss(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
        passes: Passes,
    ) -> Result<Tensor> {
        let layer = self.layer.read();
        let source = layer.source();
        let labels = read_labels(labels, check_input(hidden, source.tensor())?)?;
        let plan = CrossEntropyPlan::new(&labels, source.vocab_size(), options)?;
        let rows = layer.active()?;
        let trained = rows.as_deref().map(|rows| (rows, layer.tokens()));
        let bias = self.bias.as_ref();
        cross_entropy(hidden, source, trained, bias, &plan, passes)
    }

    /// The logits `[B, .., V]` of a mixed batch `hidden` `[B, .., D]`: each of its `B` examples sees the rows of the
    /// adapter of its name, active or not, or the base's alone.
    ///
    /// # Errors
    ///
    /// As [`logits`](Self::logits); if there are not `B` names, for an unknown one, and while the layer is merged or
    /// disabled.
    pub fn logits_mixed(&self, hidden: &Tensor, adapters: &[Option<&str>]) -> Result<Tensor> {
        let what = "hidden states of a mixed batch";
        let dims = hidden.dims();
        let [leading @ .., dim] = dims else {
            let (expected, got) = ("[examples, .., embedding_dim]", dims.to_vec());
            return Err(Error::Rank { what, expected, got });
        };
        expect_examples(what, leading, adapters)?;
        let num_rows = leading.iter().product::<usize>();
        let flat = hidden.reshape((num_rows, *dim))?;
        let (layer, bias) = (self.layer.read(), self.bias.as_ref());
        let source = layer.source();
        let (parts, adapters): (Vec<_>, Vec<_>) = layer.mixed_parts(num_rows, adapters)?.into_iter().unzip();
        let out = if parts.is_empty() {
            logits(&flat, source, None, bias)?
        } else {
            let of = |(hidden, adapter): (Tensor, Option<&TokenAdapter<Candle>>)| {
                let trained = adapter.map(|adapter| (adapter.delta(), adapter.tokens()));
                logits(&hidden, source, trained, bias)
            };
            let hidden = Candle::split_rows(flat, &parts)?.into_iter();
            Candle::join_rows(hidden.zip(adapters).map(of).collect::<Result<_>>()?)?
        };
        Ok(out.reshape([leading, &[source.vocab_size()]].concat())?)
    }
}

impl Module for TiedHead {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.logits(hidden)?)
    }
}

//! The causal language-modelling loss of transformers.

use candle_core::{Device, Tensor};
use trainable_tokens_core::IGNORED_LABEL;

use crate::data::Batch;
use crate::{Decoder, Result};

/// Whether a pass keeps the graph that gradients need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graph {
    /// Keep it.
    Keep,
    /// Drop activations as soon as they are used.
    Drop,
}

/// Mean cross-entropy over the batch's targets, shifted by one: the logits at a position predict the next label, and
/// labels of -100 are ignored. Computed in `f32`; only positions with a target reach the head, a chunk of them at a time.
///
/// # Errors
///
/// A token out of range; candle's errors.
pub fn causal_loss(model: &Decoder, batch: &Batch, graph: Graph) -> Result<Tensor> {
    let shape = (batch.num_rows(), batch.length());
    let input_ids = Tensor::from_slice(batch.input_ids(), shape, model.device())?;
    let mut embeddings = model.embed(&input_ids)?;
    if graph == Graph::Drop {
        embeddings = embeddings.detach();
    }
    let hidden = model.hidden(&embeddings)?;
    let mut labels = vec![IGNORED_LABEL; batch.input_ids().len()];
    for (position, target) in batch.target_positions().iter().zip(batch.targets()) {
        labels[*position as usize] = i64::from(*target);
    }
    let labels = Tensor::from_vec(labels, shape, &Device::Cpu)?;
    model.cross_entropy(&hidden, &labels, graph)
}

/// The number of a loss.
pub(crate) fn scalar(loss: &Tensor) -> candle_core::Result<f64> {
    loss.to_dtype(candle_core::DType::F64)?.to_scalar()
}

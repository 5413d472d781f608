//! The causal language-modelling loss of transformers.

use candle_core::{D, Device, Tensor, Var};
use trainable_tokens_core::{CrossEntropyOptions, CrossEntropyPlan, IGNORED_LABEL};

use crate::data::Batch;
use crate::ops::working_dtype;
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
    match graph {
        Graph::Drop => embeddings = embeddings.detach(),
        // Weights of LoRA join the graph of their input, so that there must be one.
        Graph::Keep if !embeddings.track_op() && !model.low_rank().is_empty() => {
            embeddings = Var::from_tensor(&embeddings)?.into_inner();
        }
        Graph::Keep => {}
    }
    let hidden = model.hidden(&embeddings)?;
    let mut labels = vec![IGNORED_LABEL; batch.input_ids().len()];
    for (position, target) in batch.target_positions().iter().zip(batch.targets()) {
        labels[*position as usize] = i64::from(*target);
    }
    let labels = Tensor::from_vec(labels, shape, &Device::Cpu)?;
    model.cross_entropy(&hidden, &labels, graph)
}

/// The same loss from the logits `[.., V]` themselves.
pub(crate) fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let labels = labels.flatten_all()?.to_vec1::<i64>()?;
    let vocab_size = logits.dim(D::Minus1)?;
    let plan = CrossEntropyPlan::new(&labels, vocab_size, CrossEntropyOptions::default())?;
    let select = |values: &[u32]| Tensor::from_slice(values, values.len(), logits.device());
    let logits = logits
        .reshape(((), vocab_size))?
        .index_select(&select(plan.positions())?, 0)?;
    let logits = logits.to_dtype(working_dtype(logits.dtype()))?;
    let highest = logits.detach().max_keepdim(D::Minus1)?;
    let shifted = logits.broadcast_sub(&highest)?;
    let normalizer = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let counted = plan
        .positions()
        .iter()
        .filter_map(|at| u32::try_from(labels[*at as usize]).ok());
    let counted = select(&counted.collect::<Vec<_>>())?.unsqueeze(1)?;
    let of_labels = shifted.gather(&counted, D::Minus1)?;
    Ok((normalizer - of_labels)?.mean_all()?)
}

/// The number of a loss.
pub(crate) fn scalar(loss: &Tensor) -> candle_core::Result<f64> {
    loss.to_dtype(candle_core::DType::F64)?.to_scalar()
}

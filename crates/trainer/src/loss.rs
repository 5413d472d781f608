//! Losses, and the graphs that they keep.

use candle_core::{D, Tensor};
use trainable_tokens_core::{CrossEntropyOptions, CrossEntropyPlan};

use crate::Result;
use crate::ops::working_dtype;

/// Whether a pass keeps the graph that gradients need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graph {
    /// Keep it.
    Keep,
    /// Drop activations as soon as they are used.
    Drop,
}

/// The mean cross-entropy of logits `[.., V]` for the label of each, in `f32`; labels of -100 are ignored.
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

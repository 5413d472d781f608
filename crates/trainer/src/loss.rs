//! The causal language-modelling loss of transformers.

use candle_core::{D, Tensor, Var};

use crate::data::Batch;
use crate::ops::{add_frozen, working_dtype};
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
/// labels of -100 are ignored. Computed in `f32`; only positions with a target reach the head.
///
/// # Errors
///
/// A token out of range; candle's errors.
pub fn causal_loss(model: &Decoder, batch: &Batch, graph: Graph) -> Result<Tensor> {
    let (rows, length) = (batch.num_rows(), batch.length());
    let input_ids = Tensor::from_slice(batch.input_ids(), (rows, length), model.device())?;
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
    let dim = hidden.dim(D::Minus1)?;
    let num_targets = batch.targets().len();
    let positions = Tensor::from_slice(batch.target_positions(), num_targets, model.device())?;
    let hidden = hidden
        .reshape((rows * length, dim))?
        .index_select(&positions, 0)?;
    let logits = model.logits(&hidden)?;
    let targets = Tensor::from_slice(batch.targets(), (num_targets, 1), model.device())?;
    Ok(cross_entropy(&logits, &targets)?)
}

/// Mean of `log(sum(exp(logits))) - logits[target]`, from `[N, V]` and `[N, 1]`.
fn cross_entropy(logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
    let logits = logits.to_dtype(working_dtype(logits.dtype()))?;
    let highest = logits.detach().max_keepdim(D::Minus1)?;
    let shifted = add_frozen(&logits, &highest.neg()?)?;
    let normalizer = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    (normalizer - shifted.gather(targets, D::Minus1)?)?.mean_all()
}

/// The number of a loss.
pub(crate) fn scalar(loss: &Tensor) -> candle_core::Result<f64> {
    loss.to_dtype(candle_core::DType::F64)?.to_scalar()
}

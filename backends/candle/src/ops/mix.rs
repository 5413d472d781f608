//! The rows of several adapters as one node of their graph.

use candle_core::{Device, Tensor};
use trainable_tokens_core::{DType, RowMix};

use crate::Result;
use crate::convert::candle_dtype;
use crate::ops::cast;

/// The mixed rows of type `dtype`, with the bits of [`RowMix::apply`]. Built of candle's own operations, so that
/// gradients reach every part in its own element type, also the rows that the mix leaves out.
///
/// # Errors
///
/// When the parts are not those of the mix, and when candle fails.
pub(crate) fn mix_rows(parts: &[&Tensor], mix: &RowMix, dtype: DType) -> Result<Tensor> {
    let shapes = parts
        .iter()
        .map(|part| part.dims2().map(|(rows, dim)| [rows, dim]));
    let shapes = shapes.collect::<candle_core::Result<Vec<_>>>()?;
    let (device, dim) = match (parts.first(), shapes.first()) {
        (Some(first), Some([_, dim])) => (first.device(), *dim),
        _ => (&Device::Cpu, 0),
    };
    mix.expect_parts(shapes, dim)?;
    let dtype = candle_dtype(dtype);
    let widened = parts.iter().map(|part| cast(part, dtype));
    let stacked = stack_rows(&widened.collect::<candle_core::Result<Vec<_>>>()?)?;
    let Some(stacked) = stacked.filter(|_| mix.num_rows() > 0) else {
        return Ok(Tensor::zeros((0, dim), dtype, device)?);
    };
    if mix.is_stack() {
        return Ok(stacked);
    }
    let select = |slots: &[u32]| stacked.index_select(&Tensor::from_slice(slots, slots.len(), device)?, 0);
    let mut rows = Vec::new();
    for round in mix.rounds() {
        let weights = Tensor::from_slice(&round.weights, (round.weights.len(), 1), &Device::Cpu)?;
        let weights = weights.to_dtype(dtype)?.to_device(device)?;
        let products = select(&round.slots)?.broadcast_mul(&weights)?;
        // The summands of later rounds are for the first rows.
        let reached = round.slots.len();
        rows = match stack_rows(&rows)? {
            None => vec![products],
            Some(sums) => {
                let rest = sums.dims()[0] - reached;
                vec![
                    (sums.narrow(0, 0, reached)? + products)?,
                    sums.narrow(0, reached, rest)?,
                ]
            }
        };
    }
    if !mix.picks().is_empty() {
        rows.push(select(mix.picks())?);
    }
    Ok(stack_rows(&rows)?.unwrap_or(stacked))
}

/// Tensors of equally long rows below each other; those without rows count for nothing.
pub(crate) fn stack_rows(parts: &[Tensor]) -> candle_core::Result<Option<Tensor>> {
    let full: Vec<_> = parts.iter().filter(|part| part.dims()[0] > 0).collect();
    match (&full[..], parts) {
        ([], []) => Ok(None),
        ([], [empty, ..]) => Ok(Some(empty.clone())),
        (full, _) => Tensor::cat(full, 0).map(Some),
    }
}

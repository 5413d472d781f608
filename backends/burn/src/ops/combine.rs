//! The rows of several adapters as one value, and values apart and together again.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use trainable_tokens_core::{DType, Error as CoreError, MixRound, RowMix};

use crate::Result;
use crate::convert::{burn_dtype, to_indices};

/// The rows that `mix` makes of those of several parameters, as a node of their graph: those of
/// [`RowMix::apply`], bit for bit.
///
/// # Errors
///
/// [`CoreError::Shape`] for rows that the mix was not made for.
pub(crate) fn combine(parts: Vec<Tensor<2>>, mix: &RowMix, dtype: DType) -> Result<Tensor<2>> {
    let dim = parts.first().map_or(0, |part| part.dims()[1]);
    mix.expect_parts(parts.iter().map(Tensor::dims), dim)?;
    let parts = parts.into_iter().filter(|part| part.dims()[0] > 0);
    let parts: Vec<_> = parts.map(|part| part.cast(burn_dtype(dtype))).collect();
    if parts.is_empty() {
        return Err(CoreError::shape("rows to combine", &[1, dim], &[0, dim]).into());
    }
    let stacked = Tensor::cat(parts, 0);
    if mix.is_stack() {
        return Ok(stacked);
    }
    let device = stacked.device();
    let weighted = mix.rounds().iter().fold(None, |sum, round| {
        let terms = terms(&stacked, round);
        Some(match sum {
            None => terms,
            Some(sum) => add_to_first(sum, terms),
        })
    });
    let picks = mix.picks();
    let picked = (!picks.is_empty()).then(|| stacked.select(0, to_indices(picks, &device)));
    Ok(Tensor::cat(weighted.into_iter().chain(picked).collect(), 0))
}

/// One summand of each of the first weighted rows.
fn terms(stacked: &Tensor<2>, round: &MixRound) -> Tensor<2> {
    let (device, dtype) = (stacked.device(), stacked.dtype());
    let weights = TensorData::new(round.weights.clone(), [round.weights.len(), 1]);
    let rows = stacked.clone().select(0, to_indices(&round.slots, &device));
    rows * Tensor::from_data(weights, (&device, dtype))
}

/// Adds to the first rows of a sum.
fn add_to_first(sum: Tensor<2>, terms: Tensor<2>) -> Tensor<2> {
    let ([all, _], [first, _]) = (sum.dims(), terms.dims());
    if first == all {
        return sum + terms;
    }
    let rest = sum.clone().narrow(0, first, all - first);
    Tensor::cat(vec![sum.narrow(0, 0, first) + terms, rest], 0)
}

/// Cuts the rows of a value.
pub(crate) fn split_rows(tensor: &Tensor<2>, parts: &[Range<usize>]) -> Vec<Tensor<2>> {
    let part = |part: &Range<usize>| {
        if part.len() == tensor.dims()[0] {
            return tensor.clone();
        }
        tensor.clone().narrow(0, part.start, part.len())
    };
    parts.iter().map(part).collect()
}

/// Puts values of equally long rows below each other.
///
/// # Errors
///
/// Without any value.
pub(crate) fn join_rows(mut parts: Vec<Tensor<2>>) -> Result<Tensor<2>> {
    // Burn cannot put nothing and nothing together.
    if parts.iter().any(|part| part.dims()[0] > 0) {
        return Ok(Tensor::cat(parts, 0));
    }
    let none = || CoreError::shape("values to join", &[1], &[0]).into();
    parts.pop().ok_or_else(none)
}

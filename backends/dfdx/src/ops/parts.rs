//! Rows of a value apart and together again, on one tape.

use std::ops::Range;

use dfdx::shapes::Axis;
use dfdx::tensor::{PutTape, SplitTape, Tape};
use dfdx::tensor_ops::{Device, GatherTo, TryConcatAlong};
use trainable_tokens_core::Error as CoreError;

use super::indices;
use crate::convert::{Matrix, dims, matrix};
use crate::{DfdxElement, Error, Result};

/// Cuts the rows of a value. The first part goes on with its tape and the others begin tapes of their own; where parts
/// meet again dfdx merges these and orders their operations by time.
///
/// dfdx's own slices will not do: their gradient overwrites what others added to that of the value.
///
/// # Errors
///
/// When dfdx fails.
pub(crate) fn split_rows<E: DfdxElement, D: Device<E>, T: Tape<E, D>>(
    value: Matrix<E, D, T>,
    parts: &[Range<usize>],
) -> Result<Vec<Matrix<E, D, T>>> {
    if parts.len() == 1 {
        return Ok(vec![value]);
    }
    let (value, tape) = value.split_tape();
    let mut tape = Some(tape);
    let cut = |part: &Range<usize>| {
        let mut tape = tape.take().unwrap_or_default();
        let (len, dim) = (part.len(), dims(&value)[1]);
        if len == 0 || dim == 0 {
            let ghost = value.ghost();
            tape.add_backward_op(move |gradients| gradients.try_alloc_for(&ghost));
            return Ok(matrix(value.device(), Vec::new(), len, dim)?.put_tape(tape));
        }
        let rows = indices(value.device(), part.clone().collect()).map_err(Error::dfdx)?;
        let value = value.clone().put_tape(tape);
        value.try_gather(rows).map_err(Error::dfdx)
    };
    parts.iter().map(cut).collect()
}

/// Puts values of equally long rows below each other: neighbours in pairs, so that no row is copied more often than the
/// logarithm of their number says.
///
/// # Errors
///
/// Without any value, and when dfdx fails.
pub(crate) fn join_rows<E: DfdxElement, D: Device<E>, T: Tape<E, D>>(
    mut parts: Vec<Matrix<E, D, T>>,
) -> Result<Matrix<E, D, T>> {
    while parts.len() > 1 {
        let mut pairs = Vec::with_capacity(parts.len().div_ceil(2));
        let mut rest = parts.into_iter();
        while let Some(first) = rest.next() {
            pairs.push(match rest.next() {
                None => first,
                Some(second) => (first, second).try_concat_along(Axis::<0>).map_err(Error::dfdx)?,
            });
        }
        parts = pairs;
    }
    let none = || CoreError::shape("values to join", &[1], &[0]).into();
    parts.pop().ok_or_else(none)
}

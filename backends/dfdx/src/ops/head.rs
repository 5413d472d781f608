//! The head that shares the table.

use dfdx::shapes::Axis;
use dfdx::tensor::{PutTape, SplitTape, Tape, Tensor};
use dfdx::tensor_ops::{BroadcastTo, ReshapeTo, TryAdd, TryMatMul, TrySub};
use trainable_tokens_core::{Error as CoreError, TokenId};

use super::{Kernels, NewRows, select, transpose};
use crate::convert::{Matrix, dims, matrix, to_vec};
use crate::{DfdxElement, Error, Result};

/// What a head computes with.
pub(crate) struct Head<'a, E: DfdxElement, D: Kernels<E>> {
    /// The frozen table.
    pub(crate) base: &'a Matrix<E, D>,
    /// The trained rows and their ids.
    pub(crate) overrides: Option<(&'a NewRows<E, D>, &'a [TokenId])>,
    pub(crate) bias: Option<&'a Tensor<(usize,), E, D>>,
}

/// The logits `[N, V]` of `hidden` `[N, D]`: dfdx's own product with the table, the columns of changed rows
/// replaced, plus the bias. Gradients go to `hidden` and to the trained rows alone; dfdx's product would make one of
/// the table.
///
/// A row that still equals the base's keeps the base's column: a product of another shape may round otherwise, and
/// untrained rows must be a no-op to the last bit.
///
/// # Errors
///
/// For hidden states of another width, and when dfdx fails.
pub(crate) fn project<E, D, T>(hidden: Matrix<E, D, T>, head: &Head<'_, E, D>) -> Result<Matrix<E, D, T>>
where
    E: DfdxElement,
    D: Kernels<E>,
    T: Tape<E, D>,
{
    let [_, dim] = dims(head.base);
    let [num_rows, width] = dims(&hidden);
    if width != dim {
        return Err(
            CoreError::shape("hidden states of the head", &[num_rows, dim], &[num_rows, width]).into(),
        );
    }
    let base_rows = match &head.overrides {
        None => Vec::new(),
        Some((_, ids)) => D::read_rows(head.base, ids)?,
    };
    let out = forward(&hidden.retaped(), head, &base_rows)?;
    // The gradient of a strided tensor has its strides, which nobody but dfdx can see.
    let (hidden, mut tape) = hidden.try_contiguous().map_err(Error::dfdx)?.split_tape();
    let out_ghost = out.ghost();
    let base = head.base.clone();
    let empty = dims(&out).contains(&0) || dim == 0;
    let overrides = match &head.overrides {
        None => None,
        Some((rows, ids)) => Some(Overrides {
            rows: (*rows).clone(),
            base_rows: matrix(base.device(), base_rows, ids.len(), dim)?,
            columns: ids.iter().map(|id| id.row()).collect(),
        }),
    };
    tape.add_backward_op(move |gradients| {
        if let Some(Overrides { rows, .. }) = &overrides {
            rows.mark(gradients)?;
        }
        gradients.try_alloc_for(&hidden)?;
        if empty {
            return Ok(());
        }
        gradients.try_alloc_for(&out_ghost)?;
        let upstream: Matrix<E, D> = gradients.get(&out_ghost);
        let mut hidden_gradient = E::widen(upstream.clone().try_matmul(base)?)?;
        if let Some(Overrides {
            rows,
            base_rows,
            columns,
            ..
        }) = overrides
        {
            let trained = E::widen(select(&transpose(upstream)?, columns)?)?;
            let difference = E::widen(rows.tensor().clone())?.try_sub(E::widen(base_rows)?)?;
            hidden_gradient = hidden_gradient.try_add(transpose(trained.clone())?.try_matmul(difference)?)?;
            let gradient = trained.try_matmul(E::widen(hidden.clone())?)?;
            D::add_row_gradient(gradients, &rows, gradient)?;
        }
        D::add_gradient(gradients, &hidden, E::narrow(hidden_gradient)?)
    });
    Ok(out.put_tape(tape))
}

/// What the backward pass keeps of the trained rows.
struct Overrides<E: DfdxElement, D: Kernels<E>> {
    rows: NewRows<E, D>,
    base_rows: Matrix<E, D>,
    columns: Vec<usize>,
}

fn forward<E: DfdxElement, D: Kernels<E>>(
    hidden: &Matrix<E, D>,
    head: &Head<'_, E, D>,
    base_rows: &[E],
) -> Result<Matrix<E, D>> {
    let [vocab_size, dim] = dims(head.base);
    let shape = (dims(hidden)[0], vocab_size);
    if shape.0 == 0 || vocab_size == 0 {
        return matrix(head.base.device(), Vec::new(), shape.0, vocab_size);
    }
    let mut logits = product(hidden, head.base).map_err(Error::dfdx)?;
    if let Some((rows, ids)) = &head.overrides {
        let rows = to_vec(rows.tensor());
        let width = dim.max(1);
        let both = rows.chunks_exact(width).zip(base_rows.chunks_exact(width));
        let changed = ids.iter().zip(both).filter(|(_, (row, base))| row != base);
        let (columns, rows): (Vec<TokenId>, Vec<&[E]>) = changed.map(|(id, (row, _))| (*id, row)).unzip();
        if !columns.is_empty() {
            let rows = matrix(head.base.device(), rows.concat(), columns.len(), dim)?;
            let part = product(hidden, &rows).map_err(Error::dfdx)?;
            logits = D::override_columns(logits, part, &columns)?;
        }
    }
    match head.bias {
        None => Ok(logits),
        Some(bias) => {
            let bias = bias.clone().try_broadcast_like::<_, Axis<0>>(&shape);
            bias.and_then(|bias| logits.try_add(bias)).map_err(Error::dfdx)
        }
    }
}

/// `hidden` times the transpose of `rows`.
fn product<E: DfdxElement, D: Kernels<E>>(
    hidden: &Matrix<E, D>,
    rows: &Matrix<E, D>,
) -> Result<Matrix<E, D>, D::Err> {
    hidden.clone().try_matmul(transpose(rows.clone())?)
}

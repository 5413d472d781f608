//! The lookup of a batch with some rows overridden.

use burn::tensor::{Bool, DType, IndexingUpdateOp, Tensor};
use trainable_tokens_core::{EmbeddingSource, LookupPlan, MaxNorm, RowTransform};

use super::gradient::{Factor, zero_with_gradient};
use crate::convert::{compute_dtype, to_indices};
use crate::{BurnTable, Result};

/// The rows `[N, D]` of a planned batch, in the table's element type, transformed. With a delta `[k, D]` the
/// result is a node of its graph; without, it is the plain lookup.
///
/// # Errors
///
/// When the plan was made for another table or delta.
pub(crate) fn lookup_rows(
    table: &BurnTable,
    delta: Option<&Tensor<2>>,
    plan: &LookupPlan,
    transform: RowTransform,
) -> Result<Tensor<2>> {
    // On a GPU an id out of range is undefined or fatal.
    plan.expect_fits(table.vocab_size(), delta.map(|delta| delta.dims()[0]))?;
    let device = table.tensor().device();
    let rows = table
        .tensor()
        .clone()
        .select(0, to_indices(plan.input_ids(), &device));
    let Some(delta) = delta else {
        return Ok(transformed(rows, transform));
    };
    if !plan.grad_positions().is_empty() && plan.grad_factors().is_none() && transform.is_identity() {
        return Ok(replaced(rows, delta, plan));
    }
    let rows = overwritten(rows, delta.clone().detach(), plan.positions(), plan.slots());
    let rows = transformed(rows, transform);
    if !delta.is_tracked() {
        return Ok(rows);
    }
    if plan.grad_positions().is_empty() {
        return Ok(in_graph(rows, delta));
    }
    let scale = transform.scale.unwrap_or(1.0);
    let factor = plan
        .grad_factors()
        .map_or(Factor::All(scale), |rows| Factor::Rows(rows, scale));
    let trained = widened(delta).select(0, to_indices(plan.grad_slots(), &device));
    let term = zero_with_gradient(trained, factor).cast(rows.dtype());
    let positions = to_indices(plan.grad_positions(), &device);
    Ok(rows.select_assign(0, positions, term, IndexingUpdateOp::Add))
}

/// Puts the trained rows into those of a batch, with their gradient. Rows of a padding token get none.
fn replaced(rows: Tensor<2>, delta: &Tensor<2>, plan: &LookupPlan) -> Tensor<2> {
    let (positions, slots) = (plan.grad_positions(), plan.grad_slots());
    let rows = if positions.len() == plan.positions().len() {
        rows
    } else {
        overwritten(rows, delta.clone().detach(), plan.positions(), plan.slots())
    };
    overwritten(rows, widened(delta), positions, slots)
}

/// Writes row `slots[i]` of `delta` to row `positions[i]` of `rows`, as their table would hold it.
///
/// Slots repeat: the rows are gathered first and rounded then, so that their gradients are widened first and summed then.
fn overwritten(rows: Tensor<2>, delta: Tensor<2>, positions: &[u32], slots: &[u32]) -> Tensor<2> {
    if positions.is_empty() {
        return rows;
    }
    let (device, dtype) = (rows.device(), rows.dtype());
    let trained = delta.select(0, to_indices(slots, &device)).cast(dtype);
    rows.select_assign(
        0,
        to_indices(positions, &device),
        trained,
        IndexingUpdateOp::Assign,
    )
}

/// The rows of the delta in a type that gradients may be summed in.
fn widened(delta: &Tensor<2>) -> Tensor<2> {
    delta.clone().cast(compute_dtype(delta.dtype()))
}

/// Shortens and scales rows that are in no graph, rounding after each.
fn transformed(mut rows: Tensor<2>, transform: RowTransform) -> Tensor<2> {
    let dtype = rows.dtype();
    let compute = compute_dtype(dtype);
    if let Some(max_norm) = transform.max_norm {
        let factors = shortening(rows.clone(), max_norm).cast(compute);
        rows = (rows.cast(compute) * factors).cast(dtype);
    }
    if let Some(scale) = transform.scale {
        rows = rows.cast(compute).mul_scalar(scale).cast(dtype);
    }
    rows
}

/// What each row is multiplied by so that it is no longer than `max_norm`: 1 if it is not, `[N, 1]`. In `f64` where the
/// device has it.
fn shortening(rows: Tensor<2>, max_norm: MaxNorm) -> Tensor<2> {
    let wide = if rows.device().supports_dtype(DType::F64) {
        DType::F64
    } else {
        DType::F32
    };
    let norms = rows.cast(wide).square().sum_dim(1).sqrt();
    let long = norms.clone().greater_elem(max_norm.get());
    let factors =
        Tensor::full(norms.shape(), max_norm.get(), (&norms.device(), wide)) / norms.add_scalar(1e-7);
    factors.mask_fill(long.bool_not(), 1.0)
}

/// Makes rows without a trained one, or with trained ones of a padding token alone, a node of the delta's graph, so that the
/// backward pass gives the delta zeros. No bit changes.
fn in_graph(rows: Tensor<2>, delta: &Tensor<2>) -> Tensor<2> {
    let [len, dim] = rows.dims();
    let device = rows.device();
    let at = to_indices(&[0][..len.min(1)], &device);
    let kept = rows.clone().select(0, at.clone());
    let masked = Tensor::<2, Bool>::full([len.min(1), dim], true, &device);
    let masked = delta
        .clone()
        .select(0, at.clone())
        .cast(rows.dtype())
        .mask_where(masked, kept);
    rows.select_assign(0, at, masked, IndexingUpdateOp::Assign)
}

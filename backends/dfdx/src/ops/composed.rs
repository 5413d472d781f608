//! Every device: the operations composed of dfdx's own.
//!
//! dfdx shows the storage of a tensor on a device to nobody, and a gradient only as storage. Two of its own backward
//! passes close the gap: that of `gather` sums rows by slot, and that of a product by a tensor puts this tensor into
//! the storage of a gradient.

use dfdx::shapes::{Axis, Dtype, HasShape};
use dfdx::tensor::{Gradients, PutTape, Tape, Tensor, Trace};
use dfdx::tensor_ops::{Backward, BroadcastTo, Device, GatherTo, SumTo, TryAdd, TryConcatAlong, TryMul};
use trainable_tokens_core::{Element, LookupPlan, MaxNorm, RowTransform, TokenId};

use super::{Indices, Kernels, Lookup, NewRows, indices, select, transpose};
use crate::convert::{Matrix, dims, matrix, to_vec};
use crate::{DfdxElement, Error, Result};

/// The rows `ids` of a table.
pub(super) fn read_rows<E: DfdxElement, D: Device<E>>(
    table: &Matrix<E, D>,
    ids: &[TokenId],
) -> Result<Vec<E>> {
    let [_, dim] = dims(table);
    if ids.is_empty() || dim == 0 {
        return Ok(Vec::new());
    }
    let rows = ids.iter().map(|id| id.row()).collect();
    Ok(to_vec(&select(table, rows).map_err(Error::dfdx)?))
}

/// The lookup: frozen rows and all trained rows side by side, then gathered in the order of the batch.
pub(super) fn lookup<E, D, T>(lookup: &Lookup<'_, E, D>, mut tape: T) -> Result<Matrix<E, D, T>>
where
    E: DfdxElement,
    D: Kernels<E>,
    T: Tape<E, D>,
{
    let out = gather(lookup)?;
    let Some(rows) = lookup.rows else {
        return Ok(out.put_tape(tape));
    };
    let (out_ghost, rows, plan) = (out.ghost(), rows.clone(), lookup.plan);
    // Index tensors without elements are not made: a device need not be able to.
    let live = (!plan.grad_positions().is_empty() && dims(rows.tensor())[1] > 0).then_some(plan);
    let index = |values: &[u32]| indices(out.device(), values.iter().map(|value| *value as usize).collect());
    let live = live.map(|plan| Ok([index(plan.grad_positions())?, index(plan.grad_slots())?]));
    let live = live.transpose().map_err(Error::dfdx::<D::Err>)?;
    let weights = weights::<E>(plan, lookup.transform.scale);
    tape.add_backward_op(move |gradients| {
        rows.mark(gradients)?;
        let Some([positions, slots]) = live else {
            return Ok(());
        };
        gradients.try_alloc_for(&out_ghost)?;
        let upstream: Matrix<E, D> = gradients.get(&out_ghost).try_gather(positions)?;
        let mut upstream = E::widen(upstream)?;
        if let Some(weights) = weights {
            upstream = multiply_rows(upstream, weights)?;
        }
        let sums = sum_by_slot(upstream, slots, *rows.tensor().shape())?;
        D::add_row_gradient(gradients, &rows, sums)
    });
    Ok(out.put_tape(tape))
}

/// Puts columns of one matrix in place of another's.
pub(super) fn override_columns<E: DfdxElement, D: Device<E>>(
    logits: Matrix<E, D>,
    part: Matrix<E, D>,
    columns: &[TokenId],
) -> Result<Matrix<E, D>> {
    let [_, vocab_size] = dims(&logits);
    let mut order: Vec<usize> = (0..vocab_size).collect();
    for (from, to) in columns.iter().enumerate() {
        order[to.row()] = vocab_size + from;
    }
    let work = || {
        let (logits, part) = (transpose(logits)?, transpose(part)?);
        transpose(select(&(logits, part).try_concat_along(Axis::<0>)?, order)?)
    };
    work().map_err(Error::dfdx)
}

/// Adds to the gradient of `leaf`, whose storage becomes that of the gradient of a product with the sum.
pub(super) fn add_gradient<E: DfdxElement, D: Device<E>>(
    gradients: &mut Gradients<E, D>,
    leaf: &Matrix<E, D>,
    add: Matrix<E, D>,
) -> Result<(), D::Err> {
    gradients.try_alloc_for(leaf)?;
    if dims(leaf).contains(&0) {
        return Ok(());
    }
    let sum = gradients.get(leaf).try_add(add)?;
    let probe: Matrix<E, D> = leaf.device().try_zeros_like(leaf.shape())?;
    let product = probe.leaky_trace().try_mul(sum)?;
    let mut storage = product.try_sum::<(), _>()?.try_backward()?;
    std::mem::swap(
        gradients.get_or_alloc_mut(leaf)?,
        storage.get_or_alloc_mut(&probe)?,
    );
    Ok(())
}

/// A gradient of rows as those of their leaves.
pub(super) fn split_gradient<E, D>(
    rows: &NewRows<E, D>,
    gradient: Matrix<E::Compute, D>,
) -> Result<Vec<Matrix<E::Compute, D>>, D::Err>
where
    E: DfdxElement,
    D: Kernels<E>,
{
    let NewRows::Combined(combined) = rows else {
        return Ok(vec![gradient]);
    };
    let (mix, device, [num_rows, dim]) = (&combined.mix, gradient.device().clone(), dims(&gradient));
    let num_stacked = mix.part_rows().iter().sum();
    let (mut from, mut to, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut add = |at, slot: u32, weight| {
        from.push(at);
        to.push(slot as usize);
        weights.push(<E::Compute as Element>::from_f64(weight));
    };
    for round in mix.rounds() {
        for (at, (slot, weight)) in round.slots.iter().zip(&round.weights).enumerate() {
            add(at, *slot, *weight);
        }
    }
    for (at, slot) in mix.picks().iter().enumerate() {
        add(mix.num_weighted() + at, *slot, 1.0);
    }
    let empty = num_rows == 0 || dim == 0;
    let stacked = if empty {
        device.try_zeros_like(&(num_stacked, dim))?
    } else {
        let terms = multiply_rows(select(&gradient, from)?, weights)?;
        sum_by_slot(terms, indices(&device, to)?, (num_stacked, dim))?
    };
    let mut start = 0;
    let part = |len: &usize| {
        let part = start..start + len;
        start = part.end;
        if part.is_empty() || dim == 0 {
            return device.try_zeros_like(&(*len, dim));
        }
        select(&stacked, part.collect())
    };
    mix.part_rows().iter().map(part).collect()
}

fn gather<E, D>(lookup: &Lookup<'_, E, D>) -> Result<Matrix<E, D>>
where
    E: DfdxElement,
    D: Device<E> + Device<E::Compute>,
{
    let Lookup {
        base,
        rows,
        plan,
        transform,
    } = lookup;
    let [_, dim] = dims(base);
    if plan.is_empty() || dim == 0 {
        return matrix(base.device(), Vec::new(), plan.len(), dim);
    }
    let rows = gather_rows(base, rows.map(NewRows::tensor), plan).map_err(Error::dfdx)?;
    transformed(rows, *transform).map_err(Error::dfdx)
}

fn transformed<E, D>(mut rows: Matrix<E, D>, transform: RowTransform) -> Result<Matrix<E, D>, D::Err>
where
    E: DfdxElement,
    D: Device<E> + Device<E::Compute>,
{
    if let Some(max_norm) = transform.max_norm {
        rows = shorten(rows, max_norm)?;
    }
    let Some(scale) = transform.scale else {
        return Ok(rows);
    };
    let scale = <E::Compute as Element>::from_f64(scale);
    let num_rows = dims(&rows)[0];
    E::narrow(multiply_rows(E::widen(rows)?, vec![scale; num_rows])?)
}

fn gather_rows<E: DfdxElement, D: Device<E>>(
    base: &Matrix<E, D>,
    rows: Option<&Matrix<E, D>>,
    plan: &LookupPlan,
) -> Result<Matrix<E, D>, D::Err> {
    let Some(rows) = rows.filter(|_| !plan.positions().is_empty()) else {
        return select(base, plan.input_ids().iter().map(|id| *id as usize).collect());
    };
    if plan.positions().len() == plan.len() {
        return select(rows, plan.slots().iter().map(|slot| *slot as usize).collect());
    }
    let mut live = plan.positions().iter().zip(plan.slots()).peekable();
    let (mut frozen, mut order) = (Vec::new(), Vec::with_capacity(plan.len()));
    for (position, id) in (0u32..).zip(plan.input_ids()) {
        if let Some((_, slot)) = live.next_if(|(at, _)| **at == position) {
            order.push(*slot as usize);
        } else {
            order.push(dims(rows)[0] + frozen.len());
            frozen.push(*id as usize);
        }
    }
    let frozen = select(base, frozen)?;
    select(&(rows.clone(), frozen).try_concat_along(Axis::<0>)?, order)
}

/// Shortens long rows. The norms come to the host: there is one for each token of the batch.
fn shorten<E, D>(rows: Matrix<E, D>, max_norm: MaxNorm) -> Result<Matrix<E, D>, D::Err>
where
    E: DfdxElement,
    D: Device<E> + Device<E::Compute>,
{
    let wide = E::widen(rows.clone())?;
    let squares = wide.clone().try_mul(wide.clone())?;
    let sums: Tensor<(usize,), E::Compute, D> = squares.try_sum::<_, Axis<1>>()?;
    let factor = |sum: E::Compute| max_norm.factor(Element::to_f64(sum).sqrt()).unwrap_or(1.0);
    let factors: Vec<f64> = sums.as_vec().into_iter().map(factor).collect();
    if factors.iter().all(|factor| *factor == 1.0) {
        return Ok(rows);
    }
    let factors = factors.into_iter().map(<E::Compute as Element>::from_f64);
    E::narrow(multiply_rows(wide, factors.collect())?)
}

/// Multiplies each row by a number of its own.
fn multiply_rows<C, D>(rows: Matrix<C, D>, factors: Vec<C>) -> Result<Matrix<C, D>, D::Err>
where
    C: Dtype,
    D: Device<C>,
{
    let shape = *rows.shape();
    let factors = rows.device().try_tensor_from_vec(factors, (shape.0,))?;
    rows.try_mul(factors.try_broadcast_like::<_, Axis<1>>(&shape)?)
}

/// What the gradient at each live position is multiplied by, if by anything.
fn weights<E: DfdxElement>(plan: &LookupPlan, scale: Option<f64>) -> Option<Vec<E::Compute>> {
    let from = <E::Compute as Element>::from_f64;
    match (plan.grad_factors(), scale.map(from)) {
        (None, None) => None,
        (None, Some(scale)) => Some(vec![scale; plan.grad_positions().len()]),
        (Some(own), None) => Some(own.iter().map(|own| from(*own)).collect()),
        (Some(own), Some(scale)) => Some(own.iter().map(|own| scale * from(*own)).collect()),
    }
}

/// Sums rows by slot: the gradient of a gather.
fn sum_by_slot<C, D>(
    rows: Matrix<C, D>,
    slots: Indices<D>,
    shape: (usize, usize),
) -> Result<Matrix<C, D>, D::Err>
where
    C: Dtype,
    D: Device<C>,
{
    let sums: Matrix<C, D> = rows.device().try_zeros_like(&shape)?;
    let picked: Matrix<C, D, _> = sums.leaky_trace().try_gather(slots)?;
    let gradients: Gradients<C, D> = picked.try_mul(rows)?.try_sum::<(), _>()?.try_backward()?;
    Ok(gradients.get(&sums))
}

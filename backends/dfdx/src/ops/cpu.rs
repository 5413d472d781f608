//! The CPU: rows are read and written by indexing, gradients are slices.

use std::convert::Infallible;

use dfdx::tensor::{Cpu, CpuError, Gradients, PutTape, Storage, Tape};
use dfdx::tensor_ops::Device;
use trainable_tokens_core::{TokenId, TokenRows, fill_rows};

use super::{Kernels, Leaf, Lookup, NewRows};
use crate::convert::{Matrix, dims, matrix, to_vec};
use crate::{DfdxElement, Error, Result};

impl<E: DfdxElement> Kernels<E> for Cpu
where
    Cpu: Device<E> + Device<E::Compute>,
{
    fn read_rows(table: &Matrix<E, Cpu>, ids: &[TokenId]) -> Result<Vec<E>> {
        let [_, dim] = dims(table);
        let mut values = Vec::with_capacity(ids.len() * dim);
        for id in ids {
            values.extend((0..dim).map(|column| table[[id.row(), column]]));
        }
        Ok(values)
    }

    fn write_rows(table: &mut Matrix<E, Cpu>, ids: &[TokenId], values: &[E]) -> Result<()> {
        let [_, dim] = dims(table);
        for (id, row) in ids.iter().zip(values.chunks_exact(dim.max(1))) {
            for (column, value) in row.iter().enumerate() {
                table[[id.row(), column]] = *value;
            }
        }
        Ok(())
    }

    fn lookup<T: Tape<E, Cpu>>(lookup: &Lookup<'_, E, Cpu>, tape: T) -> Result<Matrix<E, Cpu, T>> {
        override_rows(lookup, tape)
    }

    fn override_columns(
        mut logits: Matrix<E, Cpu>,
        part: Matrix<E, Cpu>,
        columns: &[TokenId],
    ) -> Result<Matrix<E, Cpu>> {
        for row in 0..dims(&logits)[0] {
            for (from, to) in columns.iter().enumerate() {
                logits[[row, to.row()]] = part[[row, from]];
            }
        }
        Ok(logits)
    }

    const WIDE_SUMS: bool = true;

    fn add_row_gradient(
        gradients: &mut Gradients<E, Cpu>,
        rows: &NewRows<E, Cpu>,
        add: Matrix<E::Compute, Cpu>,
    ) -> Result<(), CpuError> {
        let [num_rows, dim] = dims(&add);
        let sums = TokenRows::new(to_vec(&add), num_rows, dim);
        add_sums(gradients, rows, sums.map_err(|_| CpuError::WrongNumElements)?)
    }

    fn add_gradient(
        gradients: &mut Gradients<E, Cpu>,
        leaf: &Matrix<E, Cpu>,
        add: Matrix<E, Cpu>,
    ) -> Result<(), CpuError> {
        add_gradient(gradients, leaf, to_vec(&add))
    }
}

// The functions below do not ask for `Cpu: Device<E>`: under that bound the compiler would not see that the CPU's
// storage is a vector.

fn override_rows<E: DfdxElement, T: Tape<E, Cpu>>(
    lookup: &Lookup<'_, E, Cpu>,
    mut tape: T,
) -> Result<Matrix<E, Cpu, T>> {
    let out = gather(lookup)?;
    let Some(rows) = lookup.rows else {
        return Ok(out.put_tape(tape));
    };
    let (out_ghost, dim) = (out.ghost(), dims(&out)[1]);
    let (rows, plan, scale) = (rows.clone(), lookup.plan.clone(), lookup.transform.scale);
    tape.add_backward_op(move |gradients| {
        for reached in rows.leaves().iter().filter_map(|leaf| leaf.reached.as_ref()) {
            gradients.get_or_alloc_mut(reached)?.fill(E::ONE);
        }
        // Taken out and put back: two gradients cannot be borrowed at once, and a copy would cost the batch.
        let upstream = std::mem::take(&mut **gradients.get_or_alloc_mut(&out_ghost)?);
        let mut sums = plan.zero_gradient(E::DTYPE, dim);
        let added = plan.accumulate(&upstream, scale, &mut sums);
        **gradients.get_or_alloc_mut(&out_ghost)? = upstream;
        added.map_err(|_| CpuError::WrongNumElements)?;
        add_sums(gradients, &rows, sums)
    });
    Ok(out.put_tape(tape))
}

/// Gathers the rows of a batch in one pass, in a buffer from the device's cache.
fn gather<E: DfdxElement>(lookup: &Lookup<'_, E, Cpu>) -> Result<Matrix<E, Cpu>> {
    let Lookup {
        base,
        rows,
        plan,
        transform,
    } = lookup;
    let [_, dim] = dims(base);
    let buffer = <Cpu as Storage<E>>::try_alloc_len(base.device(), plan.len() * dim);
    let mut out = std::mem::take(&mut *buffer.map_err(Error::dfdx)?);
    let rows = rows.map(NewRows::tensor);
    let filled: Result<(), Infallible> = fill_rows(&mut out, dim, |first, out| {
        let live = plan.positions().partition_point(|at| (*at as usize) < first);
        let live = plan.positions()[live..].iter().zip(&plan.slots()[live..]);
        let mut live = live.peekable();
        let ids = plan.input_ids()[first..].iter().enumerate();
        for ((at, id), out) in ids.zip(out.chunks_exact_mut(dim.max(1))) {
            let slot = live.next_if(|(hit, _)| **hit as usize == first + at);
            match slot.map(|(_, slot)| *slot).zip(rows) {
                Some((slot, rows)) => copy_row(rows, slot, out),
                None => copy_row(base, *id, out),
            }
            transform.apply(out);
        }
        Ok(())
    });
    match filled {
        Ok(()) => {}
        Err(never) => match never {},
    }
    matrix(base.device(), out, plan.len(), dim)
}

/// Adds a gradient of rows, in the compute type, to those of their leaves. Sizes and types were checked by the forward pass.
fn add_sums<E: DfdxElement>(
    gradients: &mut Gradients<E, Cpu>,
    rows: &NewRows<E, Cpu>,
    sums: TokenRows,
) -> Result<(), CpuError> {
    let parts = match rows {
        NewRows::Leaf(_) => vec![sums],
        NewRows::Combined(combined) => {
            let parts = combined.mix.split_gradient(&sums);
            parts.map_err(|_| CpuError::WrongNumElements)?
        }
    };
    for (leaf, part) in rows.leaves().iter().zip(&parts) {
        let part = part.as_slice().ok_or(CpuError::WrongNumElements)?;
        add_leaf_gradient(gradients, leaf, part)?;
    }
    Ok(())
}

fn add_leaf_gradient<E: DfdxElement>(
    gradients: &mut Gradients<E, Cpu>,
    leaf: &Leaf<E, Cpu>,
    add: &[E::Compute],
) -> Result<(), CpuError> {
    if let Some(sums) = &leaf.sums {
        E::add_to_sums(gradients.get_or_alloc_mut(sums)?, add);
    }
    let rounded = add.iter().map(|add| E::from_compute(*add));
    add_gradient(gradients, &leaf.rows, rounded)
}

fn add_gradient<E: DfdxElement>(
    gradients: &mut Gradients<E, Cpu>,
    leaf: &Matrix<E, Cpu>,
    add: impl IntoIterator<Item = E>,
) -> Result<(), CpuError> {
    let sums = gradients.get_or_alloc_mut(leaf)?;
    sums.iter_mut().zip(add).for_each(|(sum, add)| *sum += add);
    Ok(())
}

/// Copies one row. dfdx shows a tensor's storage to nobody, but one element at a time.
fn copy_row<E: DfdxElement>(from: &Matrix<E, Cpu>, row: u32, out: &mut [E]) {
    for (column, out) in out.iter_mut().enumerate() {
        *out = from[[row as usize, column]];
    }
}

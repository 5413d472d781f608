//! The loss on the CPU: products into one buffer of logits, which become their own gradient in place.

use std::any::Any;
use std::sync::Arc;

use candle_core::{CpuStorage, Device, Result, Tensor, WithDType, utils::get_num_threads};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use parking_lot::Mutex;
use trainable_tokens_core::{CrossEntropyPlan, Element};

use super::{Computed, Projection, Wanted};
use crate::convert::unsupported;
use crate::ops::matrix::{Matrix, Old, multiply};
use crate::ops::product::chunks;
use crate::ops::storage::{DeviceStorage, elements};

/// The memory of a chunk of logits, kept from one loss of a head to the next: the system takes its time to hand out and clear
/// as much. Clones share it; of losses side by side one uses it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scratch(Arc<Mutex<Option<Box<dyn Any + Send>>>>);

impl Scratch {
    /// `len` values or more, whatever they are.
    fn take<C: Element>(&self, len: usize) -> Vec<C> {
        let kept = self.0.lock().take();
        let kept = kept.and_then(|kept| kept.downcast::<Vec<C>>().ok());
        match kept {
            Some(values) if values.len() >= len => *values,
            _ => vec![C::default(); len],
        }
    }

    fn keep<C: Element>(&self, values: Vec<C>) {
        *self.0.lock() = Some(Box::new(values));
    }
}

/// An element type of weights and hidden states.
trait Operand: Element<Compute: WithDType> {
    /// The values in the compute type: themselves, or a copy in `buffer`.
    fn widen<'a>(values: &'a [Self], buffer: &'a mut Vec<Self::Compute>) -> &'a [Self::Compute];
}

macro_rules! operands {
    ($($wide:ty)*; $($half:ty)*) => {
        $(impl Operand for $wide {
            fn widen<'a>(values: &'a [Self], _: &'a mut Vec<Self>) -> &'a [Self] {
                values
            }
        })*
        $(impl Operand for $half {
            fn widen<'a>(values: &'a [Self], buffer: &'a mut Vec<f32>) -> &'a [f32] {
                buffer.resize(values.len(), 0.0);
                values.convert_to_f32_slice(buffer);
                buffer
            }
        })*
    };
}
operands! { f32 f64; f16 bf16 }

/// The loss of contiguous hidden states `[N, D]`.
pub(super) fn compute(
    hidden: &Tensor,
    projection: &Projection<'_>,
    plan: &CrossEntropyPlan,
    wanted: Wanted,
    scratch: &Scratch,
) -> crate::Result<Computed> {
    let (dims, weight) = (projection.weight.dims2()?, projection.weight.storage_and_layout());
    let hidden = hidden.storage_and_layout();
    let bias = projection.bias.map(Tensor::storage_and_layout);
    let rows = projection
        .overrides
        .map(|overrides| overrides.rows.storage_and_layout());
    let mut columns = Vec::new();
    let mut changed = Vec::new();
    if let Some(overrides) = projection.overrides {
        columns = overrides
            .columns
            .to_vec1::<u32>()?
            .into_iter()
            .map(|id| id as usize)
            .collect();
        changed = overrides
            .changed_slots()?
            .into_iter()
            .map(|slot| slot as usize)
            .collect();
    }
    macro_rules! by_type {
        ($($variant:ident)*) => {
            match CpuStorage::of(&weight.0)? {
                $(CpuStorage::$variant(_) => {
                    macro_rules! values {
                        ($tensor:expr) => {
                            elements!(CpuStorage::of(&$tensor.0)?, $tensor.1, $variant).ok_or_else(unsupported)?
                        };
                    }
                    let bias = match &bias {
                        None => None,
                        Some(bias) => Some(values!(bias)),
                    };
                    let rows = match &rows {
                        None => &[],
                        Some(rows) => values!(rows),
                    };
                    let input = Input {
                        hidden: values!(hidden),
                        weight: values!(weight),
                        bias,
                        rows,
                        columns,
                        changed,
                        vocab_size: dims.0,
                        dim: dims.1,
                    };
                    run(&input, plan, wanted, scratch)
                })*
                _ => Err(unsupported()),
            }
        };
    }
    by_type!(F64 F32 F16 BF16)
}

/// The operands of the loss.
struct Input<'a, T> {
    hidden: &'a [T],
    weight: &'a [T],
    bias: Option<&'a [T]>,
    /// The trained rows, `[k, D]`.
    rows: &'a [T],
    /// The columns of the logits that they give.
    columns: Vec<usize>,
    /// The slots whose rows are not the weight's: those of the others keep the weight's column, to the bit.
    changed: Vec<usize>,
    vocab_size: usize,
    dim: usize,
}

/// Goes through the chunks of the plan.
fn run<T: Operand>(
    input: &Input<'_, T>,
    plan: &CrossEntropyPlan,
    wanted: Wanted,
    scratch: &Scratch,
) -> crate::Result<Computed> {
    let (zero, one) = (T::Compute::default(), <T::Compute as Element>::from_f64(1.0));
    let Input {
        dim, vocab_size: v, ..
    } = *input;
    let size = size_of::<T::Compute>();
    let (longest, threads) = (plan.longest_chunk(size), get_num_threads());
    let (k, width) = (input.columns.len(), dim.max(1));

    let mut wide = Vec::new();
    let changed_rows = input
        .changed
        .iter()
        .flat_map(|slot| &input.rows[slot * dim..][..dim]);
    let changed_rows: Vec<T::Compute> = changed_rows.map(|x| x.to_compute()).collect();
    let changed_columns: Vec<usize> = input.changed.iter().map(|slot| input.columns[*slot]).collect();
    let c = changed_columns.len();

    let mut hidden = vec![zero; longest * dim];
    let mut memory = scratch.take::<T::Compute>(longest * v);
    let mut part = vec![zero; longest * k];
    let mut row_gradients = vec![zero; if wanted.of_hidden { longest * dim } else { 0 }];
    let mut of_hidden = vec![zero; if wanted.of_hidden { input.hidden.len() } else { 0 }];
    let mut of_delta = vec![zero; if wanted.of_delta { k * dim } else { 0 }];
    let mut loss = 0.0;

    for chunk in plan.chunks(size) {
        let n = chunk.len();
        let positions = &plan.positions()[chunk.clone()];
        let positions = || positions.iter().map(|position| *position as usize);
        for (to, position) in hidden.chunks_exact_mut(width).zip(positions()) {
            let from = &input.hidden[position * dim..][..dim];
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_compute());
        }
        let (logits, part) = (&mut memory[..n * v], &mut part[..n * k]);
        let rows = Matrix::new(&hidden, [n, dim]);
        for block in blocks::<T>(n, v, dim) {
            let weight = T::widen(&input.weight[block.start * dim..block.end * dim], &mut wide);
            let weight = Matrix::new(weight, [block.len(), dim]);
            let to = (Old::Replace, &mut logits[block.start..], v);
            multiply(rows, weight.transposed(), one, to, threads)?;
        }
        let trained = Matrix::new(&changed_rows, [c, dim]);
        multiply(
            rows,
            trained.transposed(),
            one,
            (Old::Replace, &mut *part, c),
            threads,
        )?;
        put(part, logits, v, &changed_columns);
        if let Some(bias) = input.bias {
            for row in logits.chunks_exact_mut(v) {
                let each = row.iter_mut().zip(bias);
                each.for_each(|(x, bias)| *x += bias.to_compute());
            }
        }
        if !wanted.of_hidden && !wanted.of_delta {
            loss += plan.loss(chunk, logits, threads)?;
            continue;
        }
        loss += plan.differentiate(chunk, logits, 1.0, threads)?;
        if wanted.of_delta {
            take(part, logits, v, &input.columns);
            let part = Matrix::new(part, [n, k]);
            multiply(
                part.transposed(),
                rows,
                one,
                (Old::Add, &mut of_delta, dim),
                threads,
            )?;
        }
        if wanted.of_hidden {
            // What the replaced columns give comes from the trained rows.
            take(part, logits, v, &changed_columns);
            clear(logits, v, &changed_columns);
            let mut old = Old::Replace;
            for block in blocks::<T>(n, v, dim) {
                let weight = T::widen(&input.weight[block.start * dim..block.end * dim], &mut wide);
                let weight = Matrix::new(weight, [block.len(), dim]);
                let columns = Matrix::new(&logits[block.start..], [n, block.len()]).with_stride(v);
                multiply(columns, weight, one, (old, &mut row_gradients, dim), threads)?;
                old = Old::Add;
            }
            let part = Matrix::new(part, [n, c]);
            multiply(part, trained, one, (Old::Add, &mut row_gradients, dim), threads)?;
            for (position, from) in positions().zip(row_gradients.chunks_exact(width)) {
                of_hidden[position * dim..][..dim].copy_from_slice(from);
            }
        }
    }
    scratch.keep(memory);
    let tensor = |wanted: bool, values, rows| -> Result<Option<Tensor>> {
        wanted
            .then(|| Tensor::from_vec(values, (rows, dim), &Device::Cpu))
            .transpose()
    };
    Ok(Computed {
        loss: Tensor::from_vec(vec![<T::Compute as Element>::from_f64(loss)], (), &Device::Cpu)?,
        of_hidden: tensor(wanted.of_hidden, of_hidden, plan.num_rows())?,
        of_delta: tensor(wanted.of_delta, of_delta, k)?,
    })
}

/// The rows of the weight to multiply with at a time: all, unless they are widened first.
fn blocks<T: Operand>(n: usize, v: usize, dim: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let whole = T::DTYPE == <T::Compute as Element>::DTYPE;
    let all = whole.then_some(0..v);
    let parts = (!whole).then(|| chunks(n, v, dim));
    all.into_iter().chain(parts.into_iter().flatten())
}

/// Puts the columns of `part` at `columns` of the logits, whose rows are `v` long.
fn put<C: Copy>(part: &[C], logits: &mut [C], v: usize, columns: &[usize]) {
    let rows = logits
        .chunks_exact_mut(v)
        .zip(part.chunks_exact(columns.len().max(1)));
    for (row, part) in rows {
        columns.iter().zip(part).for_each(|(column, x)| row[*column] = *x);
    }
}

/// Copies `columns` of the logits to `part`.
fn take<C: Copy>(part: &mut [C], logits: &[C], v: usize, columns: &[usize]) {
    let rows = logits
        .chunks_exact(v)
        .zip(part.chunks_exact_mut(columns.len().max(1)));
    for (row, part) in rows {
        part.iter_mut()
            .zip(columns)
            .for_each(|(x, column)| *x = row[*column]);
    }
}

/// Sets `columns` of the logits to zero.
fn clear<C: Copy + Default>(logits: &mut [C], v: usize, columns: &[usize]) {
    for row in logits.chunks_exact_mut(v) {
        columns.iter().for_each(|column| row[*column] = C::default());
    }
}

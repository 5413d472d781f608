//! The loss on the CPU, in one pass over the weight: products into a block of logits, whose weights in the softmax are
//! multiplied with the same rows of the weight at once, as attention does it whose keys are its values (Dao et al. 2022,
//! arXiv:2205.14135). No row of logits ever exists as a whole.

mod chunk;

use candle_core::{CpuStorage, Device, Result, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use num_traits::Float;
use trainable_tokens_core::{CrossEntropyPlan, Element};

use self::chunk::{Chunk, PARTS};
use super::{Computed, Projection, Wanted};
use crate::convert::unsupported;
use crate::ops::storage::{DeviceStorage, elements};

/// The most rows of hidden states that share a pass over the weight: each part sums their gradients for itself.
const ROWS: usize = 512;
/// The elements of the weight in a block, to be in cache for the second product, and its rows at least and at most.
const BLOCK_ELEMENTS: usize = 1 << 20;
const BLOCK_ROWS: (usize, usize) = (256, 2048);

/// An element type of weights and hidden states.
trait Operand: Element<Compute: WithDType + Float> {
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
                    run(&input, plan, wanted)
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

/// The loss, chunk by chunk of rows.
fn run<T: Operand>(input: &Input<'_, T>, plan: &CrossEntropyPlan, wanted: Wanted) -> crate::Result<Computed> {
    let (dim, k) = (input.dim, input.columns.len());
    let zero = T::Compute::default();
    let mut of_hidden = vec![zero; if wanted.of_hidden { input.hidden.len() } else { 0 }];
    let mut of_delta = vec![zero; if wanted.of_delta { k * dim } else { 0 }];
    let block = block_rows(dim);
    // The blocks of all parts are logits at once.
    let rows = PARTS * block * size_of::<T::Compute>();
    let rows = plan.options().chunk.max_rows(rows).min(ROWS);
    let counted: Vec<_> = plan.positions().iter().zip(plan.labels()).collect();
    let mut loss = 0.0;
    for counted in counted.chunks(rows) {
        let labels: Vec<usize> = counted.iter().map(|(_, label)| **label as usize).collect();
        let positions = || counted.iter().map(|(position, _)| **position as usize);
        let hidden = positions().flat_map(|position| &input.hidden[position * dim..][..dim]);
        let chunk = Chunk::new(
            input,
            plan,
            (hidden.map(|x| x.to_compute()).collect(), &labels),
            wanted,
        )?;
        let mut sums = chunk.sums(block)?;
        loss += chunk.finish(&mut sums, &mut of_delta)?;
        if wanted.of_hidden {
            for (position, from) in positions().zip(sums.of_hidden.chunks_exact(dim.max(1))) {
                of_hidden[position * dim..][..dim].copy_from_slice(from);
            }
        }
    }
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

/// How many rows of a weight whose rows are `dim` long are multiplied with at a time.
fn block_rows(dim: usize) -> usize {
    (BLOCK_ELEMENTS / dim.max(1)).clamp(BLOCK_ROWS.0, BLOCK_ROWS.1)
}

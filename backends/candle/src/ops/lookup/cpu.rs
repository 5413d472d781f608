//! The lookup on the CPU: one pass that copies rows, and a gradient that touches live rows only.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};
use half::{bf16, f16};
use trainable_tokens_core::{Element, LookupPlan, RowRef, RowTransform, TokenRows};

use crate::convert::{candle_dtype, core_dtype, row_ref, to_tensor, unsupported};
use crate::ops::storage::elements;

/// Gathers the rows of a batch. Of the overriding rows only those that occur are read and converted.
pub(super) fn gather(
    base: &CpuStorage,
    layout: &Layout,
    overrides: Option<(&CpuStorage, &Layout)>,
    plan: &LookupPlan,
    transform: RowTransform,
) -> Result<CpuStorage> {
    let dim = layout.dims()[1];
    let row = |slot: u32| {
        overrides
            .map(|(delta, layout)| row_ref(delta, layout.start_offset() + slot as usize * dim, dim))
            .transpose()
    };
    let batch = Batch {
        plan,
        dim,
        transform,
        overridden: overrides.is_some(),
    };
    if let Some(base) = elements!(base, layout, F32) {
        Ok(CpuStorage::F32(batch.gather::<f32>(base, row)?))
    } else if let Some(base) = elements!(base, layout, BF16) {
        Ok(CpuStorage::BF16(batch.gather::<bf16>(base, row)?))
    } else if let Some(base) = elements!(base, layout, F16) {
        Ok(CpuStorage::F16(batch.gather::<f16>(base, row)?))
    } else if let Some(base) = elements!(base, layout, F64) {
        Ok(CpuStorage::F64(batch.gather::<f64>(base, row)?))
    } else {
        Err(unsupported().into())
    }
}

struct Batch<'a> {
    plan: &'a LookupPlan,
    dim: usize,
    transform: RowTransform,
    overridden: bool,
}

impl Batch<'_> {
    fn gather<'r, T: Element>(
        &self,
        base: &[T],
        row: impl Fn(u32) -> Result<Option<RowRef<'r>>>,
    ) -> Result<Vec<T>> {
        let (ids, dim) = (self.plan.input_ids(), self.dim);
        let mut out: Vec<T> = Vec::with_capacity(ids.len() * dim);
        let live = self.plan.positions().iter().zip(self.plan.slots());
        let mut live = live.take(if self.overridden { usize::MAX } else { 0 }).peekable();
        for (position, &id) in (0u32..).zip(ids) {
            let start = out.len();
            match live.next_if(|(at, _)| **at == position) {
                None => {
                    let from = id as usize * dim;
                    out.extend_from_slice(&base[from..from + dim]);
                }
                Some((_, &slot)) => {
                    out.resize(start + dim, T::default());
                    if let Some(row) = row(slot)? {
                        row.decode_into(&mut out[start..]);
                    }
                }
            }
            self.transform.apply(&mut out[start..]);
        }
        Ok(out)
    }
}

/// The gradient of the delta: live rows of the contiguous `upstream`, summed by slot in the compute type.
pub(super) fn accumulate(
    upstream: &Tensor,
    delta: &Tensor,
    plan: &LookupPlan,
    factor: Option<f64>,
) -> Result<Tensor> {
    let dtype = core_dtype("gradient of the lookup", upstream.dtype())?;
    let mut sums = plan.zero_gradient(dtype, delta.dims()[1]);
    let (storage, layout) = upstream.storage_and_layout();
    if let Storage::Cpu(storage) = &*storage {
        add(storage, layout, plan, factor, &mut sums)?;
    }
    let sums = sums.to_dtype(core_dtype("trained rows", delta.dtype())?);
    debug_assert_eq!(candle_dtype(sums.dtype()), delta.dtype());
    to_tensor(&sums, delta.device())
}

fn add(
    storage: &CpuStorage,
    layout: &Layout,
    plan: &LookupPlan,
    factor: Option<f64>,
    sums: &mut TokenRows,
) -> Result<()> {
    let added = if let Some(upstream) = elements!(storage, layout, F32) {
        plan.accumulate(upstream, factor, sums)
    } else if let Some(upstream) = elements!(storage, layout, BF16) {
        plan.accumulate(upstream, factor, sums)
    } else if let Some(upstream) = elements!(storage, layout, F16) {
        plan.accumulate(upstream, factor, sums)
    } else if let Some(upstream) = elements!(storage, layout, F64) {
        plan.accumulate(upstream, factor, sums)
    } else {
        return Err(unsupported().into());
    };
    added.map_err(|error| crate::Error::Core(error).into())
}

//! The lookup on the CPU: one pass that copies rows, and a gradient that touches live rows only.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};
use trainable_tokens_core::{DType, Gather, LookupPlan, RowTransform, Slot, TokenId, TokenRows};

use crate::convert::{candle_dtype, core_dtype, into_tensor, row_ref, unsupported};
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
    let frozen = row_ref(base, layout)?;
    let rows = overrides
        .map(|(delta, layout)| row_ref(delta, layout))
        .transpose()?;
    let gather = Gather {
        plan,
        embedding_dim: dim,
        dtype: frozen.dtype(),
        transform,
        frozen: |id: TokenId| frozen.get(id.row() * dim, dim),
        trained: rows.map(|rows| move |slot: Slot| rows.get(slot.0 * dim, dim)),
    };
    let rows = match frozen.dtype() {
        DType::F64 => gather.to_vec().map(CpuStorage::F64),
        DType::F32 => gather.to_vec().map(CpuStorage::F32),
        DType::F16 => gather.to_vec().map(CpuStorage::F16),
        DType::BF16 => gather.to_vec().map(CpuStorage::BF16),
    };
    rows.map_err(|error| crate::Error::Core(error).into())
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
    into_tensor(sums, delta.device())
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

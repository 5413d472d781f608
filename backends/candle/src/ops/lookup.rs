//! The lookup of a batch with some rows overridden.

mod cpu;
mod device;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Device, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};
use trainable_tokens_core::{DeltaStore, EmbeddingSource, LookupPlan, RowTransform};

use self::device::Uploaded;
use crate::{CandleDelta, CandleTable};

/// The rows of a planned batch, `[N, D]` in the shape that is asked for, in the table's element type, transformed. With a
/// delta the result is a node of its graph; without, it is the plain lookup.
///
/// # Errors
///
/// When the plan was made for another table or delta, and when candle fails.
pub(crate) fn lookup_rows(
    table: &CandleTable,
    delta: Option<&CandleDelta>,
    plan: &Arc<LookupPlan>,
    transform: RowTransform,
    shape: Shape,
) -> crate::Result<Tensor> {
    // On a GPU an id out of range is undefined or fatal.
    plan.expect_fits(table.vocab_size(), delta.map(DeltaStore::num_rows))?;
    let base = table.tensor();
    let uploaded = match base.device() {
        Device::Cpu => None,
        _ => Some(Uploaded::new(table, delta, plan, transform)?),
    };
    if let Some(delta) = delta {
        return Ok(delta.tensor().apply_op1(OverrideRows {
            base: base.clone(),
            plan: Arc::clone(plan),
            transform,
            shape,
            uploaded,
        })?);
    }
    let (storage, layout) = base.storage_and_layout();
    let rows = match (&*storage, &uploaded) {
        (Storage::Cpu(storage), _) => Storage::Cpu(cpu::gather(storage, layout, None, plan, transform)?),
        (Storage::Cuda(storage), Some(batch)) => Storage::Cuda(device::gather(storage, layout, batch)?),
        (Storage::Metal(storage), Some(batch)) => Storage::Metal(device::gather(storage, layout, batch)?),
        _ => return Err(not_sent().into()),
    };
    Ok(Tensor::from_storage(rows, shape, BackpropOp::none(), false))
}

fn not_sent() -> candle_core::Error {
    candle_core::Error::msg("the batch was not sent to the device")
}

/// The lookup as an operation on the delta. The base is captured, so that it is no part of the graph.
struct OverrideRows {
    base: Tensor,
    plan: Arc<LookupPlan>,
    transform: RowTransform,
    /// That of the result.
    shape: Shape,
    /// Present on every device but the CPU.
    uploaded: Option<Uploaded>,
}

impl OverrideRows {
    fn gather_on_device<S: super::storage::DeviceStorage>(&self) -> Result<(S, Shape)> {
        let Some(batch) = &self.uploaded else {
            return Err(not_sent());
        };
        let (base, layout) = self.base.storage_and_layout();
        Ok((device::gather(S::of(&base)?, layout, batch)?, self.shape.clone()))
    }
}

impl CustomOp1 for OverrideRows {
    fn name(&self) -> &'static str {
        "trainable-tokens-lookup"
    }

    fn cpu_fwd(&self, delta: &CpuStorage, delta_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if self.uploaded.is_some() {
            return self.gather_on_device();
        }
        let (base, layout) = self.base.storage_and_layout();
        let base = <CpuStorage as super::storage::DeviceStorage>::of(&base)?;
        let overrides = Some((delta, delta_layout));
        let rows = cpu::gather(base, layout, overrides, &self.plan, self.transform)?;
        Ok((rows, self.shape.clone()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.gather_on_device()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.gather_on_device()
    }

    fn bwd(&self, delta: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let upstream = upstream.detach().contiguous()?;
        let gradient = match &self.uploaded {
            None => cpu::accumulate(&upstream, delta, &self.plan, self.transform.scale)?,
            Some(batch) => {
                let rows = (self.plan.len(), self.base.dims()[1]);
                batch.accumulate(&upstream.reshape(rows)?, delta)?
            }
        };
        Ok(Some(gradient))
    }
}

//! A prepared tensor as a node of the trained rows' graph.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Tensor};

use crate::ops::{DeviceStorage, cast};

/// Returns a copy of a prepared tensor, of which the first rows are the argument; its gradient is theirs.
pub(super) struct Graft {
    table: Tensor,
}

impl Graft {
    pub(super) fn new(table: Tensor) -> Self {
        Self { table }
    }

    fn copy<S: DeviceStorage>(&self) -> Result<(S, Shape)> {
        let (storage, layout) = self.table.storage_and_layout();
        Ok((S::of(&storage)?.try_clone(layout)?, self.table.shape().clone()))
    }
}

impl CustomOp1 for Graft {
    fn name(&self) -> &'static str {
        "trainable-tokens-compact-table"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.copy()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.copy()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.copy()
    }

    fn bwd(&self, delta: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let rows = upstream.detach().narrow(0, 0, delta.dims()[0])?;
        cast(&rows.contiguous()?, delta.dtype()).map(Some)
    }
}

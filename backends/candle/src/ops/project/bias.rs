//! A bias on logits, out of which it gets no gradient.

use candle_core::op::Add;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Tensor};

use crate::ops::storage::DeviceStorage;

/// `x + bias` for `x` `[N, V]` and the detached bias `[V]`; only `x` gets a gradient.
pub(crate) fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.apply_op1(AddBias(bias.clone()))
}

/// `x + bias` on any device.
pub(super) fn add<S: DeviceStorage>(x: &S, layout: &Layout, bias: &Tensor) -> Result<S> {
    if layout.shape().elem_count() == 0 {
        return x.zeros(layout.shape());
    }
    let bias = bias.broadcast_as(layout.shape())?;
    let (bias, bias_layout) = bias.storage_and_layout();
    x.binary_impl::<Add>(S::of(&bias)?, layout, bias_layout)
}

struct AddBias(Tensor);

impl AddBias {
    fn forward<S: DeviceStorage>(&self, x: &S, layout: &Layout) -> Result<(S, Shape)> {
        Ok((add(x, layout, &self.0)?, layout.shape().clone()))
    }
}

impl CustomOp1 for AddBias {
    fn name(&self) -> &'static str {
        "frozen-bias"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(x, layout)
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(x, layout)
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(x, layout)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(upstream.detach()))
    }
}

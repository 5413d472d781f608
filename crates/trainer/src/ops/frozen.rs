//! Operations with a frozen operand: the operand gets no gradient, unlike with candle's own.

use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::op::{Add, BinaryOpT, Mul};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor};

use super::storage::{cpu, cuda, metal};

/// `x * constant`, the constant broadcast to `x`'s shape; only `x` gets a gradient.
pub(crate) fn mul_frozen(x: &Tensor, constant: &Tensor) -> Result<Tensor> {
    let constant = constant.detach().broadcast_as(x.shape())?;
    x.contiguous()?.apply_op1(WithFrozen::<Mul> {
        factor: Some(constant.clone()),
        constant,
        operation: PhantomData,
    })
}

/// `x + constant`, the constant broadcast to `x`'s shape; only `x` gets a gradient.
pub(crate) fn add_frozen(x: &Tensor, constant: &Tensor) -> Result<Tensor> {
    let constant = constant.detach().broadcast_as(x.shape())?;
    x.contiguous()?.apply_op1(WithFrozen::<Add> {
        factor: None,
        constant,
        operation: PhantomData,
    })
}

/// An elementwise operation whose second operand is captured, so that it is no part of the graph.
struct WithFrozen<Op> {
    /// Of the result's shape, its strides 0 where it is broadcast.
    constant: Tensor,
    /// What the gradient is multiplied by; nothing for a sum.
    factor: Option<Tensor>,
    operation: PhantomData<Op>,
}

impl<Op: BinaryOpT> WithFrozen<Op> {
    fn forward<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        storage_of: fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (storage, constant) = self.constant.storage_and_layout();
        let frozen = storage_of(&storage).ok_or_else(|| {
            candle_core::Error::msg("a frozen tensor and its operand lie on different devices").bt()
        })?;
        Ok((
            x.binary_impl::<Op>(frozen, layout, constant)?,
            layout.shape().clone(),
        ))
    }
}

impl<Op: BinaryOpT + Send + Sync> CustomOp1 for WithFrozen<Op> {
    fn name(&self) -> &'static str {
        "with-frozen"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(x, layout, cpu)
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(x, layout, cuda)
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(x, layout, metal)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        match &self.factor {
            None => Ok(Some(upstream.clone())),
            Some(factor) => Ok(Some((upstream * factor)?)),
        }
    }
}

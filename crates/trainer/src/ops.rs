//! Operations with a frozen operand: the operand gets no gradient, unlike with candle's own.

use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::op::{Add, BinaryOpT, Mul};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

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

/// Root-mean-square norm over the last dimension, in `f32`, with a frozen weight (Zhang and Sennrich 2019; rounding
/// as in transformers' `LlamaRMSNorm`).
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(working_dtype(dtype))?;
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_mul(&(mean_square + eps)?.sqrt()?.recip()?)?;
    mul_frozen(&normed.to_dtype(dtype)?, weight)
}

/// Softmax over the last dimension, differentiable (candle-nn's fast one cuts the graph in silence).
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(working_dtype(dtype))?;
    let highest = x.detach().max_keepdim(D::Minus1)?.neg()?;
    let exponentials = add_frozen(&x, &highest)?.exp()?;
    exponentials
        .broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?
        .to_dtype(dtype)
}

/// The type that norms, softmax and losses compute in.
pub(crate) fn working_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
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
        self.forward(x, layout, |storage| match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(x, layout, |storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(x, layout, |storage| match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        match &self.factor {
            None => Ok(Some(upstream.clone())),
            Some(factor) => Ok(Some((upstream * factor)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// The gradient of `sum(f(x) * w)` against central differences.
    fn matches_finite_differences(f: impl Fn(&Tensor) -> Result<Tensor>) {
        let x =
            Var::from_tensor(&Tensor::new(&[[0.3f64, -1.2, 0.7], [2.0, 0.1, -0.4]], &Device::Cpu).unwrap())
                .unwrap();
        let w = Tensor::new(&[[0.5f64, -0.3, 1.1], [0.2, 0.9, -0.7]], &Device::Cpu).unwrap();
        let loss = |x: &Tensor| (f(x).unwrap() * &w).unwrap().sum_all().unwrap();
        let gradients = loss(x.as_tensor()).backward().unwrap();
        let gradient = gradients
            .get(x.as_tensor())
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let start = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (at, analytic) in gradient.iter().enumerate() {
            let nudged = |by: f64| {
                let mut values = start.clone();
                values[at] += by;
                loss(&Tensor::from_vec(values, (2, 3), &Device::Cpu).unwrap())
                    .to_scalar::<f64>()
                    .unwrap()
            };
            let slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5;
            assert!(
                (slope - analytic).abs() < 1e-8,
                "element {at}: {slope} {analytic}"
            );
        }
    }

    #[test]
    fn gradients_are_the_slopes() {
        let weight = Tensor::new(&[1.5f64, 0.5, -2.0], &Device::Cpu).unwrap();
        matches_finite_differences(softmax);
        matches_finite_differences(|x| rms_norm(x, &weight, 1e-6));
        matches_finite_differences(|x| mul_frozen(x, &weight));
        matches_finite_differences(|x| add_frozen(&x.sqr()?, &weight));
        matches_finite_differences(|x| mul_frozen(&x.t()?.sqr()?, &weight.narrow(0, 0, 2)?)?.t());
    }

    #[test]
    fn the_frozen_operand_gets_no_gradient() {
        let x = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let frozen = Var::new(&[3f32, 4.0], &Device::Cpu).unwrap();
        let gradients = mul_frozen(x.as_tensor(), frozen.as_tensor())
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert!(gradients.get(frozen.as_tensor()).is_none());
        assert!(gradients.get(x.as_tensor()).is_some());
    }
}

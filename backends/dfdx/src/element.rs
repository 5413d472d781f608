//! The element types that dfdx and core share.

use dfdx::shapes::{Dtype, Shape};
use dfdx::tensor::Tensor;
use dfdx::tensor_ops::Device;
use half::f16;
use trainable_tokens_core::Element;

/// An element type of a table: `f32`, `f64` or `f16`.
///
/// dfdx has no bfloat16, so a table of that type is widened to `f32` when it is loaded
/// ([`DfdxTable::load`](crate::DfdxTable::load)). Its `AMP<f16>` is no element type of core's.
pub trait DfdxElement: Element<Compute: Dtype> + Dtype + sealed::Widen {}

impl DfdxElement for f32 {}
impl DfdxElement for f64 {}
impl DfdxElement for f16 {}

mod sealed {
    use super::{Device, Dtype, Element, Shape, Tensor, f16};

    /// Between an element type and the one that its arithmetic runs in, on any device.
    pub trait Widen: Element<Compute: Dtype> + Dtype {
        fn widen<S, D>(tensor: Tensor<S, Self, D>) -> Result<Tensor<S, Self::Compute, D>, D::Err>
        where
            S: Shape,
            D: Device<Self> + Device<Self::Compute>;
        fn narrow<S, D>(tensor: Tensor<S, Self::Compute, D>) -> Result<Tensor<S, Self, D>, D::Err>
        where
            S: Shape,
            D: Device<Self> + Device<Self::Compute>;
    }

    macro_rules! identity {
        ($ty:ty) => {
            impl Widen for $ty {
                fn widen<S: Shape, D: Device<$ty>>(
                    tensor: Tensor<S, $ty, D>,
                ) -> Result<Tensor<S, $ty, D>, D::Err> {
                    Ok(tensor)
                }
                fn narrow<S: Shape, D: Device<$ty>>(
                    tensor: Tensor<S, $ty, D>,
                ) -> Result<Tensor<S, $ty, D>, D::Err> {
                    Ok(tensor)
                }
            }
        };
    }
    identity!(f32);
    identity!(f64);

    impl Widen for f16 {
        fn widen<S, D>(tensor: Tensor<S, f16, D>) -> Result<Tensor<S, f32, D>, D::Err>
        where
            S: Shape,
            D: Device<f16> + Device<f32>,
        {
            tensor.try_to_dtype()
        }
        fn narrow<S, D>(tensor: Tensor<S, f32, D>) -> Result<Tensor<S, f16, D>, D::Err>
        where
            S: Shape,
            D: Device<f16> + Device<f32>,
        {
            tensor.try_to_dtype()
        }
    }
}

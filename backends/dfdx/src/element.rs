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

        /// How many elements hold one sum of the type that arithmetic runs in, bit for bit.
        const WIDTH: usize;
        /// Adds to sums, each in `WIDTH` elements.
        fn add_to_sums(sums: &mut [Self], add: &[Self::Compute]);
        /// Reads sums, each from `WIDTH` elements.
        fn read_sums(sums: &[Self]) -> Vec<Self::Compute>;
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

                const WIDTH: usize = 1;
                fn add_to_sums(sums: &mut [$ty], add: &[$ty]) {
                    sums.iter_mut().zip(add).for_each(|(sum, add)| *sum += *add);
                }
                fn read_sums(sums: &[$ty]) -> Vec<$ty> {
                    sums.to_vec()
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

        const WIDTH: usize = 2;
        fn add_to_sums(sums: &mut [f16], add: &[f32]) {
            for (sum, add) in sums.chunks_exact_mut(2).zip(add) {
                let bits = (join(sum) + *add).to_bits().to_le_bytes();
                sum.copy_from_slice(&[
                    f16::from_le_bytes([bits[0], bits[1]]),
                    f16::from_le_bytes([bits[2], bits[3]]),
                ]);
            }
        }
        fn read_sums(sums: &[f16]) -> Vec<f32> {
            sums.chunks_exact(2).map(join).collect()
        }
    }

    /// The number whose bits are those of two halves.
    fn join(halves: &[f16]) -> f32 {
        let bits = |half: usize| u32::from(halves[half].to_bits());
        f32::from_bits(bits(0) | bits(1) << 16)
    }
}

//! Custom operations: what makes a step's cost independent of the vocabulary.
//!
//! Each has one forward pass over candle's storage trait, which serves every device, and a faster one for the CPU.

mod lookup;
mod loss;
pub mod matrix;
mod mix;
mod product;
mod project;
mod storage;

pub(crate) use lookup::lookup_rows;
pub(crate) use loss::{Passes, linear_cross_entropy};
pub(crate) use mix::{mix_rows, stack_rows};
pub(crate) use project::{Overrides, check_input, project};
pub(crate) use storage::DeviceStorage;

use candle_core::{DType, Result, Tensor};

/// [`Tensor::to_dtype`], also for a tensor without elements, for which candle asks a GPU to run nothing, which CUDA refuses.
/// Such a tensor has no gradient to lead back.
pub(crate) fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.elem_count() == 0 && tensor.dtype() != dtype {
        return Tensor::zeros(tensor.shape(), dtype, tensor.device());
    }
    tensor.to_dtype(dtype)
}

/// The type that arithmetic on elements of type `dtype` runs in.
fn compute_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

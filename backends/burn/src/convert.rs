//! Between burn's tensors and rows on the host.

use burn::tensor::{self as burn_tensor, Device, Element, Int, Tensor, TensorData};
use half::{bf16, f16};
use trainable_tokens_core::{self as core, DType, RowData, TokenRows};

use crate::{Error, Result};

/// The element type as core names it; integers, quantised and 8-bit floats are refused.
pub(crate) fn core_dtype(what: &'static str, dtype: burn_tensor::DType) -> Result<DType> {
    match dtype {
        burn_tensor::DType::F64 => Ok(DType::F64),
        burn_tensor::DType::F32 => Ok(DType::F32),
        burn_tensor::DType::F16 => Ok(DType::F16),
        burn_tensor::DType::BF16 => Ok(DType::BF16),
        got => Err(Error::ElementType {
            what,
            expected: "F64, F32, F16 or BF16",
            got,
        }),
    }
}

/// The element type as burn names it.
pub(crate) fn burn_dtype(dtype: DType) -> burn_tensor::DType {
    match dtype {
        DType::F64 => burn_tensor::DType::F64,
        DType::F32 => burn_tensor::DType::F32,
        DType::F16 => burn_tensor::DType::F16,
        DType::BF16 => burn_tensor::DType::BF16,
    }
}

/// The type that arithmetic on an element type runs in, and that gradients are summed in: at least `f32`.
pub(crate) fn compute_dtype(dtype: burn_tensor::DType) -> burn_tensor::DType {
    match dtype {
        burn_tensor::DType::F16 | burn_tensor::DType::BF16 => burn_tensor::DType::F32,
        wide => wide,
    }
}

/// Copies rows to a device, bit for bit.
pub(crate) fn to_tensor(what: &'static str, rows: &TokenRows, device: &Device) -> Result<Tensor<2>> {
    into_tensor(what, rows.clone(), device)
}

/// Moves rows to a device, bit for bit: to one in host memory without a copy.
pub(crate) fn into_tensor(what: &'static str, rows: TokenRows, device: &Device) -> Result<Tensor<2>> {
    let dtype = burn_dtype(rows.dtype());
    if !device.supports_dtype(dtype) {
        return Err(Error::Unsupported {
            what,
            dtype: rows.dtype(),
            device: format!("{device:?}"),
        });
    }
    let shape = rows.shape();
    let data = match rows.into_data() {
        RowData::F64(values) => TensorData::new(values, shape),
        RowData::F32(values) => TensorData::new(values, shape),
        RowData::F16(values) => TensorData::new(values, shape),
        RowData::BF16(values) => TensorData::new(values, shape),
        _ => {
            let (expected, got) = ("F64, F32, F16 or BF16", dtype);
            return Err(Error::ElementType { what, expected, got });
        }
    };
    Ok(Tensor::from_data(data, (device, dtype)))
}

/// Copies a tensor to the host, bit for bit.
pub(crate) fn to_rows(what: &'static str, tensor: Tensor<2>) -> Result<TokenRows> {
    fn read<T: Element + core::Element>(data: TensorData, [rows, dim]: [usize; 2]) -> Result<TokenRows> {
        Ok(TokenRows::new(data.try_into_vec::<T>()?, rows, dim)?)
    }
    let (shape, dtype) = (tensor.dims(), core_dtype(what, tensor.dtype())?);
    let data = tensor.try_into_data()?;
    match dtype {
        DType::F64 => read::<f64>(data, shape),
        DType::F32 => read::<f32>(data, shape),
        DType::F16 => read::<f16>(data, shape),
        DType::BF16 => read::<bf16>(data, shape),
    }
}

/// Indices on a device, in its own integer type.
pub(crate) fn to_indices(values: &[u32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

/// Gives the first dimension of a tensor more of them. Burn's own `reshape` takes a size of 0 for one to keep.
pub(crate) fn unflatten<const R: usize>(tensor: Tensor<2>, dims: [usize; R]) -> Tensor<R> {
    if tensor.dims()[0] > 0 {
        return tensor.reshape(dims);
    }
    // There is no element to place, but the result stays in the tensor's graph.
    Tensor::zeros(dims, (&tensor.device(), tensor.dtype())) + tensor.sum().unsqueeze()
}

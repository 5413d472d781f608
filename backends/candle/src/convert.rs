//! Between candle's tensors and rows on the host.

use std::cell::RefCell;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor, Var, WithDType};
use trainable_tokens_core::{DType, Element, ErrorKind, RowData, RowRef, TokenRows};

use crate::{Error, Result};

/// The element type as core names it; integers and 8-bit floats are refused.
pub(crate) fn core_dtype(what: &'static str, dtype: candle_core::DType) -> Result<DType> {
    match dtype {
        candle_core::DType::F64 => Ok(DType::F64),
        candle_core::DType::F32 => Ok(DType::F32),
        candle_core::DType::F16 => Ok(DType::F16),
        candle_core::DType::BF16 => Ok(DType::BF16),
        got => Err(Error::ElementType {
            what,
            expected: "F64, F32, F16 or BF16",
            got,
        }),
    }
}

/// The element type as candle names it.
pub(crate) fn candle_dtype(dtype: DType) -> candle_core::DType {
    match dtype {
        DType::F64 => candle_core::DType::F64,
        DType::F32 => candle_core::DType::F32,
        DType::F16 => candle_core::DType::F16,
        DType::BF16 => candle_core::DType::BF16,
    }
}

/// Runs one expression with `$values` bound to the vector of whatever element type the rows have.
macro_rules! with_values {
    ($rows:expr, $values:ident => $body:expr) => {
        match $rows.data() {
            RowData::F64($values) => $body,
            RowData::F32($values) => $body,
            RowData::F16($values) => $body,
            RowData::BF16($values) => $body,
            _ => return Err(unsupported().into()),
        }
    };
}

/// Copies rows to a device, bit for bit.
pub(crate) fn to_tensor(rows: &TokenRows, device: &Device) -> candle_core::Result<Tensor> {
    let [num_rows, dim] = rows.shape();
    with_values!(rows, values => Tensor::from_slice(values, (num_rows, dim), device))
}

/// Moves rows to a device, bit for bit: on the CPU without a copy.
pub(crate) fn into_tensor(rows: TokenRows, device: &Device) -> candle_core::Result<Tensor> {
    let shape = (rows.num_rows(), rows.embedding_dim());
    match rows.into_data() {
        RowData::F64(values) => Tensor::from_vec(values, shape, device),
        RowData::F32(values) => Tensor::from_vec(values, shape, device),
        RowData::F16(values) => Tensor::from_vec(values, shape, device),
        RowData::BF16(values) => Tensor::from_vec(values, shape, device),
        _ => Err(unsupported().into()),
    }
}

/// Makes a variable of rows, bit for bit.
pub(crate) fn to_var(rows: &TokenRows, device: &Device) -> candle_core::Result<Var> {
    let [num_rows, dim] = rows.shape();
    with_values!(rows, values => Var::from_slice(values, (num_rows, dim), device))
}

/// Copies a two-dimensional tensor to the host, bit for bit.
pub(crate) fn to_rows(tensor: &Tensor) -> Result<TokenRows> {
    fn read<T: WithDType + Element>(flat: &Tensor, num_rows: usize, dim: usize) -> Result<TokenRows> {
        Ok(TokenRows::new(flat.to_vec1::<T>()?, num_rows, dim)?)
    }
    let (num_rows, dim) = tensor.dims2()?;
    let dtype = core_dtype("rows", tensor.dtype())?;
    if num_rows == 0 || dim == 0 {
        return Ok(TokenRows::zeros(dtype, num_rows, dim));
    }
    let flat = tensor.detach().flatten_all()?;
    match dtype {
        DType::F64 => read::<f64>(&flat, num_rows, dim),
        DType::F32 => read::<f32>(&flat, num_rows, dim),
        DType::F16 => read::<half::f16>(&flat, num_rows, dim),
        DType::BF16 => read::<half::bf16>(&flat, num_rows, dim),
    }
}

/// Borrows the elements of a contiguous tensor in CPU storage, as a row of whatever type it holds.
pub(crate) fn row_ref<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<RowRef<'a>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::NotContiguous { what: "rows" }.into());
    };
    Ok(match storage {
        CpuStorage::F64(values) => RowRef::F64(&values[start..end]),
        CpuStorage::F32(values) => RowRef::F32(&values[start..end]),
        CpuStorage::F16(values) => RowRef::F16(&values[start..end]),
        CpuStorage::BF16(values) => RowRef::BF16(&values[start..end]),
        _ => return Err(unsupported().into()),
    })
}

/// Puts the elements of rows in the place of those of a tensor in CPU storage that is as large, without a copy.
pub(crate) struct Replace(RefCell<Option<RowData>>);

impl Replace {
    pub(crate) fn with(rows: TokenRows) -> Self {
        Self(RefCell::new(Some(rows.into_data())))
    }
}

impl InplaceOp1 for Replace {
    fn name(&self) -> &'static str {
        "trainable-tokens-replace"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        fn replace<T>(old: &mut Vec<T>, new: Vec<T>, layout: &Layout) -> candle_core::Result<()> {
            if old.len() == new.len() && layout.contiguous_offsets() == Some((0, new.len())) {
                *old = new;
                return Ok(());
            }
            Err(Error::NotContiguous { what: "rows" }.into())
        }
        match (storage, self.0.take()) {
            (CpuStorage::F64(old), Some(RowData::F64(new))) => replace(old, new, layout),
            (CpuStorage::F32(old), Some(RowData::F32(new))) => replace(old, new, layout),
            (CpuStorage::F16(old), Some(RowData::F16(new))) => replace(old, new, layout),
            (CpuStorage::BF16(old), Some(RowData::BF16(new))) => replace(old, new, layout),
            _ => Err(unsupported().into()),
        }
    }
}

/// The refusal of an element type that the constructors have already excluded.
pub(crate) fn unsupported() -> Error {
    Error::Source {
        kind: ErrorKind::Unsupported,
        source: "an element type that is not F64, F32, F16 or BF16".into(),
    }
}

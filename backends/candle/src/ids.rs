//! Reading `input_ids` to the host.

use candle_core::{DType, Tensor, WithDType};
use trainable_tokens_core::Error as CoreError;

use crate::{Error, Result};

/// The ids of a tensor of any integer type, shape, layout and device, flattened. An id that no `u32` can hold is
/// refused here, one at or above `vocab_size` by whoever looks it up.
pub(crate) fn read_ids(ids: &Tensor, vocab_size: usize) -> Result<Vec<u32>> {
    if ids.dtype() == DType::U32 && ids.elem_count() > 0 {
        return Ok(ids.detach().flatten_all()?.to_vec1()?);
    }
    let narrow =
        |id: i64| u32::try_from(id).map_err(|_| Error::Core(CoreError::TokenOutOfRange { id, vocab_size }));
    read_integers("input_ids", ids)?.into_iter().map(narrow).collect()
}

/// The values of a tensor of any integer type, shape, layout and device, flattened.
pub(crate) fn read_integers(what: &'static str, values: &Tensor) -> Result<Vec<i64>> {
    fn read<T: WithDType + Into<i64>>(flat: &Tensor) -> Result<Vec<i64>> {
        Ok(flat.to_vec1::<T>()?.into_iter().map(Into::into).collect())
    }
    if values.elem_count() == 0 && values.dtype().is_int() {
        return Ok(Vec::new());
    }
    let flat = values.detach().flatten_all()?;
    match flat.dtype() {
        DType::U8 => read::<u8>(&flat),
        DType::U32 => read::<u32>(&flat),
        DType::I16 => read::<i16>(&flat),
        DType::I32 => read::<i32>(&flat),
        DType::I64 => read::<i64>(&flat),
        got => Err(Error::ElementType {
            what,
            expected: "an integer type",
            got,
        }),
    }
}

/// The labels of hidden states with these leading dimensions.
pub(crate) fn read_labels(labels: &Tensor, leading: &[usize]) -> Result<Vec<i64>> {
    let what = "labels";
    if labels.dims() != leading {
        return Err(CoreError::shape(what, leading, labels.dims()).into());
    }
    read_integers(what, labels)
}

/// Makes sure that the first of `dims` counts the examples, of which each has a name or none.
pub(crate) fn expect_examples(what: &'static str, dims: &[usize], adapters: &[Option<&str>]) -> Result<()> {
    if dims.first() == Some(&adapters.len()) {
        return Ok(());
    }
    let rest = dims.get(1..).unwrap_or_default();
    Err(CoreError::shape(what, &[&[adapters.len()], rest].concat(), dims).into())
}

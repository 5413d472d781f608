//! Reading `input_ids` to the host.

use candle_core::{DType, Tensor, WithDType};
use trainable_tokens_core::Error as CoreError;

use crate::{Error, Result};

/// The ids of a tensor of any integer type, shape, layout and device, flattened. An id that no `u32` can hold is
/// refused here, one at or above `vocab_size` by whoever looks it up.
pub(crate) fn read_ids(ids: &Tensor, vocab_size: usize) -> Result<Vec<u32>> {
    fn read<T: WithDType + Into<i64>>(ids: &Tensor, vocab_size: usize) -> Result<Vec<u32>> {
        let narrow = |id: T| {
            let id: i64 = id.into();
            u32::try_from(id).map_err(|_| Error::Core(CoreError::TokenOutOfRange { id, vocab_size }))
        };
        ids.to_vec1::<T>()?.into_iter().map(narrow).collect()
    }
    if ids.elem_count() == 0 && ids.dtype().is_int() {
        return Ok(Vec::new());
    }
    let flat = ids.detach().flatten_all()?;
    match flat.dtype() {
        DType::U32 => Ok(flat.to_vec1()?),
        DType::U8 => read::<u8>(&flat, vocab_size),
        DType::I16 => read::<i16>(&flat, vocab_size),
        DType::I32 => read::<i32>(&flat, vocab_size),
        DType::I64 => read::<i64>(&flat, vocab_size),
        got => Err(Error::ElementType {
            what: "input_ids",
            expected: "an integer type",
            got,
        }),
    }
}

/// Makes sure that the first of `dims` counts the examples, of which each has a name or none.
pub(crate) fn expect_examples(what: &'static str, dims: &[usize], adapters: &[Option<&str>]) -> Result<()> {
    if dims.first() == Some(&adapters.len()) {
        return Ok(());
    }
    let rest = dims.get(1..).unwrap_or_default();
    Err(CoreError::shape(what, &[&[adapters.len()], rest].concat(), dims).into())
}

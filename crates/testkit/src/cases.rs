//! The cases: plain functions that return a reason, one module per group. Their one list is in `case.rs`.
//!
//! Every function fails with the reason if the backend does not do what its first sentence says.
#![allow(clippy::missing_errors_doc)]

pub mod adapters;
pub mod allocation;
pub mod delta;
pub mod errors;
pub mod gradient;
pub mod head;
pub mod hooks;
pub mod init;
pub mod lookup;
pub mod loss;
pub mod merge;
pub mod optimizer;
pub mod serialization;
pub mod several;
pub mod source;

use trainable_tokens_core::DType;

/// All element types.
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// Some other element type.
const fn other_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F32 => DType::F64,
        _ => DType::F32,
    }
}

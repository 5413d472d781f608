//! A backend for tables that are plain nested vectors: the smallest one that there can be.
//!
//! It is the example of `docs/adding-a-backend.md`, to copy from. It is slow; for tables in host memory use
//! `trainable-tokens-ndarray`.

mod backend;
mod backward;
mod error;
mod matrix;
mod rows;
mod table;

pub use backend::NestedVec;
pub use backward::Gradients;
pub use error::{Error, Result};
pub use matrix::Matrix;
pub use rows::VecRows;
pub use table::VecTable;

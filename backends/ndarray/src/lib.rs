//! The ndarray backend of trainable-tokens: the reference, with explicit gradients.
//!
//! Train two rows of a table, without ever copying the table:
//!
//! ```
//! use ndarray::{Array2, array};
//! use trainable_tokens_core::{Sgd, SgdConfig, TokenSet};
//! use trainable_tokens_ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
//!
//! # fn main() -> Result<(), trainable_tokens_ndarray::Error> {
//! let table = array![[0.0f32, 0.0], [1.0, 1.0], [2.0, 2.0]];
//! // Two lines in the place of `table.select(Axis(0), ids)`:
//! let mut embedding: TrainableTokens<_> = TrainableTokens::new(NdTable::new(table)?, TokenSet::new([2, 0], 3)?)?;
//! let rows: Array2<f32> = embedding.lookup(&[0, 1, 2, 2])?;
//! assert_eq!(rows, array![[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]);
//!
//! // The gradient of the rows from that of the output: rows of equal tokens are summed.
//! let plan = embedding.plan(&[0, 1, 2, 2])?;
//! let gradient = embedding.backward(&plan, Array2::ones((4, 2)).view())?;
//! embedding.step(&gradient, &mut Sgd::new(SgdConfig { lr: 0.5, ..SgdConfig::default() })?, &mut [])?;
//! assert_eq!(embedding.lookup(&[2, 1, 0])?, array![[1.0, 1.0], [1.0, 1.0], [-0.5, -0.5]]);
//! # Ok(())
//! # }
//! ```
//!
//! A table is any [`HostTable`](trainable_tokens_core::HostTable): an array in memory ([`NdTable`]), or a
//! memory-mapped safetensors file (`MappedTable` of trainable-tokens-format). Values come out in the element type
//! `O`: `f32` unless said otherwise.

mod backend;
mod error;
mod head;
mod layer;
mod loss;
mod rows;
mod table;

pub use backend::Ndarray;
pub use error::Error;
pub use layer::{TrainableTokens, TrainableTokensExt};
pub use loss::{CrossEntropy, LossBuffers};
pub use rows::{NdGradient, NdRows};
pub use table::NdTable;

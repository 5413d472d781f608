//! The candle backend of `trainable-tokens`: fine-tune a few rows of a frozen embedding table on CPU, CUDA or Metal.
//!
//! Two lines replace a [`candle_nn::Embedding`]; from then on only the chosen rows train, and neither time nor
//! memory of a step depends on the size of the vocabulary:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, VarBuilder};
//! use trainable_tokens_candle::TrainableTokens;
//! use trainable_tokens_core::{Adam, AdamConfig};
//!
//! # fn main() -> candle_core::Result<()> {
//! let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
//! let embed = candle_nn::embedding(100, 8, vb)?;
//! let mut embed = TrainableTokens::wrap(embed, &[5, 7])?;
//!
//! let ids = Tensor::new(&[[5u32, 1, 7], [2, 7, 7]], &Device::Cpu)?;
//! let loss = (embed.forward(&ids)? - 1.0)?.sqr()?.mean_all()?;
//! let mut adam = Adam::new(AdamConfig::ADAMW).map_err(candle_core::Error::wrap)?;
//! embed.step(&loss.backward()?, &mut adam, &mut [])?;
//! assert_eq!(embed.rows()?.shape(), [2, 8]);
//! # Ok(())
//! # }
//! ```
//!
//! - [`TrainableTokens`] is the embedding, with any number of adapters by name, [`AdapterMut`] one of them to train, and
//!   [`TiedHead`] the output layer that shares all of it.
//! - [`FrozenLinear`] is a linear layer that never makes a gradient of its weight, as candle's own always does.
//! - [`matrix`] multiplies into memory that is there already, for operations of one's own.
//! - [`merged_var_builder`], [`MergedBackend`] and [`CompactTable`] serve models whose code cannot be changed.
//! - [`Candle`], [`CandleTable`] and [`CandleDelta`] implement the traits of `trainable-tokens-core`.
//!
//! Features `cuda` and `metal` forward to candle's; the same operations run on every device.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod adapter;
mod backend;
mod convert;
mod error;
mod head;
mod ids;
mod layer;
mod linear;
mod ops;
mod rows;
mod shared;
mod table;
mod var_builder;

pub use adapter::AdapterMut;
pub use backend::Candle;
pub use error::{Error, Result};
pub use head::TiedHead;
pub use layer::TrainableTokens;
pub use linear::FrozenLinear;
pub use ops::matrix;
pub use rows::CandleDelta;
pub use table::CandleTable;
pub use var_builder::{CompactTable, MergedBackend, merged_var_builder};

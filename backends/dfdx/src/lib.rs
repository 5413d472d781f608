//! The dfdx backend of `trainable-tokens`: fine-tune a few rows of a frozen embedding table.
//!
//! Two lines replace a [`dfdx::nn::modules::Embedding`]; from then on only the chosen rows train, and neither time nor
//! memory of a step depends on the size of the vocabulary:
//!
//! ```
//! use dfdx::prelude::*;
//! use trainable_tokens_core::{Adam, AdamConfig};
//! use trainable_tokens_dfdx::TrainableTokens;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dev = Cpu::default();
//! let embed = dev.build_module::<Embedding<100, 8>, f32>();
//! let mut embed = TrainableTokens::wrap(embed, &[5, 7])?;
//!
//! let ids = dev.tensor([[5, 1, 7], [2, 7, 7]]);
//! let loss = (embed.try_forward(ids.leaky_trace())? - 1.0).square().mean();
//! let mut adam = Adam::new(AdamConfig::ADAMW)?;
//! embed.step(&loss.backward(), &mut adam, &mut [])?;
//! assert_eq!(embed.rows()?.shape(), [2, 8]);
//! # Ok(())
//! # }
//! ```
//!
//! - [`TrainableTokens`] is the embedding, with any number of adapters by name; [`TiedHead`] is the output layer that
//!   shares its table.
//! - [`TrainableEmbedding`] is the embedding as a collection of tensors of const sizes, for dfdx's own optimizers.
//! - [`Dfdx`], [`DfdxTable`] and [`DfdxDelta`] implement the traits of `trainable-tokens-core`.
//!
//! # What works where
//!
//! | | CPU | CUDA (feature `cuda`) |
//! |---|---|---|
//! | tables of `f32`, `f64`, `f16` | yes | yes |
//! | lookup, all options of core's layer | one pass over the rows | composed of dfdx's operations |
//! | head, gradients | yes | composed of dfdx's operations |
//! | several adapters at once | combined on the host | the same; their gradient is divided on the device |
//! | merge, unmerge | in place | refused: dfdx writes a tensor there as a whole or not at all |
//!
//! - **bfloat16** does not exist in dfdx. [`DfdxTable::load`] widens such a table to `f32`, which is exact.
//! - **`AMP<f16>`** is a number of dfdx's alone, and no element type of core's.
//! - **Rows of `f32` over a table of `f16`** (the default, as in PEFT) live on the host beside the leaf, which holds
//!   them rounded: all tensors of one graph of dfdx have one element type. Their gradient is summed in `f32` on the CPU,
//!   rounded sum by sum on CUDA. Core's optimizers train them; dfdx's own cannot.
//! - **dfdx's own optimizers** take tensors of sizes known at compile time only: through
//!   [`TrainableEmbedding`], or [`TrainableTokens::change_rows`].
//! - **A tape from `alloc_grads()`** drops the gradients of all but the leaves it was made for. Call
//!   [`TrainableTokens::zero_grads`] on it, so that those of the rows stay, too.
//! - **Tensors without elements**: dfdx panics when it reduces or reads one. Lookup and head return them for an empty
//!   batch.
//! - A tensor that is cloned is **copied on write**: keep no clone of the table when merging in place.

mod backend;
mod convert;
mod element;
mod error;
mod head;
mod layer;
mod module;
mod ops;
mod rows;
mod table;

pub use backend::Dfdx;
pub use element::DfdxElement;
pub use error::{Error, Result};
pub use head::TiedHead;
pub use layer::TrainableTokens;
pub use module::TrainableEmbedding;
pub use ops::DfdxDevice;
pub use rows::DfdxDelta;
pub use table::DfdxTable;

/// Compiles the front page.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

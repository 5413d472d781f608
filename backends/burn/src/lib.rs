//! The burn backend of `trainable-tokens`: fine-tune a few rows of a frozen embedding table on every device of burn.
//!
//! Two lines replace a [`burn::nn::Embedding`]; from then on only the chosen rows train, and neither time nor memory
//! of a step depends on the size of the vocabulary:
//!
//! ```
//! use burn::nn::EmbeddingConfig;
//! use burn::tensor::{Device, Int, Tensor};
//! use trainable_tokens_burn::{TrainableTokens, backward};
//! use trainable_tokens_core::{Adam, AdamConfig};
//!
//! # fn main() -> trainable_tokens_burn::Result<()> {
//! let device = Device::flex().autodiff();
//! let embed = EmbeddingConfig::new(100, 8).init(&device);
//! let mut embed = TrainableTokens::wrap(embed, &[5, 7])?;
//!
//! let ids = Tensor::<2, Int>::from_data([[5, 1, 7], [2, 7, 7]], &device);
//! let loss = (embed.forward(ids) - 1.0).square().mean();
//! embed.step(&backward(&loss)?, &mut Adam::new(AdamConfig::ADAMW)?, &mut [])?;
//! assert_eq!(embed.rows()?.shape(), [2, 8]);
//! # Ok(())
//! # }
//! ```
//!
//! - [`TrainableTokens`] is the embedding, a burn module that burn's own optimizers train too, with any number of adapters
//!   by name ([`TokenAdapter`]); [`TiedHead`] is the output layer that shares its table; [`TrainableTokensConfig`] makes one.
//! - [`train_rows`] serves models whose code cannot be changed, at a price.
//! - [`backward`] is burn's backward pass with an error where burn panics.
//! - [`Burn`], [`BurnTable`] and [`BurnDelta`] implement the traits of `trainable-tokens-core`.
//!
//! # What works where
//!
//! Tables of F32, F64, F16 and BF16, as far as the device computes in them. Rows over a table of half precision train in
//! F32, and their gradients are summed in F32. A backward pass of one's own is open to no crate outside of burn for all
//! its devices; everything here is made of burn's differentiable operations, so that it runs wherever they do. The
//! features `flex`, `cuda`, `rocm`, `wgpu`, `metal` and `vulkan` forward to burn's; tests run on Flex, the CPU.
//!
//! Burn's tensors and parameters are values: clones do not see what is written. So a merge writes in place only through
//! the last handle on the table, and a [`TiedHead`] borrows its layer.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod adapter;
mod backend;
mod backward;
mod config;
mod convert;
mod error;
mod head;
mod ids;
mod layer;
mod ops;
mod reparameterization;
mod rows;
mod table;

pub use adapter::{AdapterMut, AdapterRef, TokenAdapter};
pub use backend::Burn;
pub use backward::backward;
pub use config::TrainableTokensConfig;
pub use error::{Error, Result};
pub use head::TiedHead;
pub use layer::TrainableTokens;
pub use reparameterization::{TrainableRows, train_rows};
pub use rows::BurnDelta;
pub use table::BurnTable;

//! Reads and writes PEFT trainable-token adapters and Hugging Face checkpoints.
//!
//! - [`Adapter`]: a directory of `adapter_config.json` ([`AdapterConfig`]) and `adapter_model.safetensors`. What
//!   PEFT wrote is read and written again byte for byte; what this crate adds to the header
//!   ([`AdapterMetadata`]) PEFT ignores.
//! - [`Checkpoint`], [`SafetensorsFile`]: models in safetensors, mapped into memory. [`MappedTable`]: one of their
//!   tables as a frozen [`EmbeddingSource`](trainable_tokens_core::EmbeddingSource); [`digest()`]: what it is.
//! - [`Merge`]: adapters, with LoRA's weights ([`LoraWeights`]), baked into a copy of a checkpoint;
//!   [`merge_checkpoint`]: rows alone. [`Resize`]: a copy with rows for new tokens.
//! - [`Extract`]: the way back, an adapter from a checkpoint and the one that it was tuned from. [`CheckpointDiff`],
//!   [`AdapterDiff`]: what differs between two. [`split_adapter`]: rows into the model, LoRA's weights beside it.
//! - [`TrainingState`]: the optimizer's memory beside the adapter.
//! - [`write_dir_atomically`], [`write_file_atomically`]: output that appears whole or not at all.
//!
//! ```
//! use trainable_tokens_core::{TokenRows, TokenSet};
//! use trainable_tokens_format::{Adapter, Overwrite};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let home = tempfile::tempdir()?;
//! # let dir = home.path().join("adapter");
//! let tokens = TokenSet::new([277, 5], 320)?;
//! let rows = TokenRows::new(vec![0.5f32; 2 * 4], 2, 4)?;
//! let adapter = Adapter::builder("model.embed_tokens", &tokens, rows)
//!     .tied("lm_head")
//!     .build()?;
//! adapter.write(&dir, Overwrite::Refuse)?;
//!
//! let adapter = Adapter::read(&dir)?;
//! assert_eq!(adapter.modules()[0].token_indices(), [277, 5]);
//! assert_eq!(adapter.rows("lm_head"), adapter.rows("model.embed_tokens"));
//! # Ok(())
//! # }
//! ```
//!
//! Files are untrusted: whatever they hold, the outcome is a value or an [`Error`] that names the culprit.

mod adapter;
mod atomic;
mod checkpoint;
mod config;
mod diff;
mod digest;
mod error;
mod extract;
mod file;
mod header;
mod json;
mod lora;
mod merge;
mod model;
mod regex;
mod split;
mod state;
mod table;

pub use adapter::{
    Adapter, AdapterBuilder, AdapterMetadata, AdapterModule, AdapterSet, BaseCheck, ModuleMetadata,
    SaveEmbeddingLayers,
};
pub use atomic::{Overwrite, write_dir_atomically, write_file_atomically};
pub use checkpoint::Checkpoint;
pub use config::{AdapterConfig, PeftType, TargetModules, TaskType, TokenIndices, is_path_or_suffix};
pub use diff::{AdapterDiff, CheckpointDiff, ModuleDiff, RowDiff, TableDiff, TensorDiff, TensorDifference};
pub use digest::{InvalidDigest, TableDigest, digest};
pub use error::{Error, Result};
pub use extract::Extract;
pub use file::{SafetensorsFile, TensorRef};
pub use lora::{LoraDelta, LoraLayer, LoraWeights};
pub use merge::{Merge, MergeReport, Resize, ResizeReport, RowReplacement, merge_checkpoint};
pub use model::{ModelTables, TargetedTable};
pub use split::split_adapter;
pub use state::TrainingState;
pub use table::{ExtendedTable, MappedTable};

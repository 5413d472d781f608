//! Framework-free traits and logic for training chosen rows of a frozen embedding table.
//!
//! The method is *Trainable Tokens* of Hugging Face PEFT (`src/peft/tuners/trainable_tokens/layer.py`): of a
//! `V x D` embedding table only `k` chosen rows train, and the trained rows **replace** the base rows (they are
//! never added to them). This crate holds what every backend shares:
//!
//! - [`TokenSet`]: which tokens train, in slot order; [`LookupPlan`]: where a batch meets them.
//! - [`EmbeddingSource`], [`WriteRows`], [`HostTable`]: the frozen table; [`Int8Table`]: a quantised one. [`DeltaStore`]:
//!   the trained rows.
//! - [`RowInit`], [`initial_rows`]: how the rows start.
//! - [`Backend`]: the few operations that only a tensor framework can know; [`Gather`] helps those in host memory,
//!   [`HostRows`] and [`RowGradients`] those without a graph.
//! - [`TrainableTokens`]: the layer, written once over them, with exact merge and unmerge, and any number of
//!   [`TokenAdapter`]s by name: one or several active at once, or one per example of a mixed batch.
//! - [`CrossEntropyPlan`]: the loss of a head without a matrix of all logits, chunk by chunk.
//! - [`RowOptimizer`] ([`Sgd`], [`Adam`]) and [`OptimizerHook`] ([`ClipGradNorm`], [`DecayTowardOriginal`],
//!   [`ClampRowNorm`], [`MatchRowNorm`]).
//!
//! It does no file I/O and knows no framework.
#![forbid(unsafe_code)]

mod active;
mod adapter;
mod backend;
mod delta;
mod dtype;
mod error;
mod gather;
mod hook;
mod host;
mod init;
mod journal;
mod layer;
mod loss;
mod mix;
mod nearest;
mod optim;
mod options;
mod plan;
mod quantized;
mod rows;
mod source;
mod token;

pub use active::Overlap;
pub use adapter::TokenAdapter;
pub use backend::Backend;
pub use delta::DeltaStore;
pub use dtype::{DType, Element};
pub use error::{BackendError, Error, ErrorKind, Result};
pub use gather::{Gather, fill_rows};
pub use hook::{
    ClampRowNorm, ClipGradNorm, DecayTowardOriginal, MatchRowNorm, OptimizerHook, StepContext, joint_norm,
};
pub use host::{HostRows, RowGradients};
pub use init::{
    InitError, InitMode, InitModifier, InitText, ParseInitError, Population, RowInit, initial_rows,
    mean_row_norm,
};
pub use journal::UndoJournal;
pub use layer::{ActiveRows, KnownActive, LayerParts, MergeCheck, MergeParts, MixedPart, TrainableTokens};
pub use loss::{
    CrossEntropyOptions, CrossEntropyPlan, IGNORED_LABEL, LogitsChunk, OnlineSoftmax, Reduction, Softcap,
};
pub use mix::{MixRound, RowMix};
pub use nearest::{Neighbour, nearest_rows};
pub use optim::{
    Adam, AdamConfig, Decay, OptimizerState, RowOptimizer, Sgd, SgdConfig, StepReport, step_delta, step_rows,
};
pub use options::{EmbedScale, LayerOptions, MaxNorm, RowTransform};
pub use plan::LookupPlan;
pub use quantized::Int8Table;
pub use rows::{RowData, TokenRows};
pub use source::{EmbeddingSource, HostTable, RowRef, WriteRows};
pub use token::{Padding, PaddingRule, Slot, TokenId, TokenSet};

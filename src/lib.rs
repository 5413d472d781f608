#![cfg_attr(
    all(
        feature = "burn",
        feature = "candle",
        feature = "dfdx",
        feature = "format",
        feature = "ndarray"
    ),
    doc = include_str!("../README.md")
)]
#![cfg_attr(
    not(all(
        feature = "burn",
        feature = "candle",
        feature = "dfdx",
        feature = "format",
        feature = "ndarray"
    )),
    doc = "Fine-tune a few rows of a frozen embedding table: PEFT's Trainable Tokens in Rust."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

pub mod prelude;

pub use trainable_tokens_core::{
    ActiveRows, Adam, AdamConfig, Backend, BackendError, ClampRowNorm, ClipGradNorm, CrossEntropyOptions,
    CrossEntropyPlan, DType, Decay, DecayTowardOriginal, DeltaStore, Element, EmbedScale, EmbeddingSource,
    Error, ErrorKind, HostRows, HostTable, IGNORED_LABEL, InitError, InitMode, InitModifier, InitText,
    Int8Table, LayerOptions, LogitsChunk, LookupPlan, MatchRowNorm, MaxNorm, MergeCheck, MixRound, MixedPart,
    OnlineSoftmax, OptimizerHook, OptimizerState, Overlap, Padding, PaddingRule, ParseInitError, Population,
    Reduction, Result, RowData, RowGradients, RowInit, RowMix, RowOptimizer, RowRef, RowTransform, Sgd,
    SgdConfig, Slot, Softcap, StepContext, StepReport, TokenAdapter, TokenId, TokenRows, TokenSet,
    TrainableTokens, UndoJournal, WriteRows, initial_rows, mean_row_norm, step_delta, step_rows,
};

#[cfg(feature = "burn")]
#[cfg_attr(docsrs, doc(cfg(feature = "burn")))]
pub use trainable_tokens_burn as burn;
#[cfg(feature = "candle")]
#[cfg_attr(docsrs, doc(cfg(feature = "candle")))]
pub use trainable_tokens_candle as candle;
#[cfg(feature = "dfdx")]
#[cfg_attr(docsrs, doc(cfg(feature = "dfdx")))]
pub use trainable_tokens_dfdx as dfdx;
#[cfg(feature = "format")]
#[cfg_attr(docsrs, doc(cfg(feature = "format")))]
pub use trainable_tokens_format as format;
#[cfg(feature = "ndarray")]
#[cfg_attr(docsrs, doc(cfg(feature = "ndarray")))]
pub use trainable_tokens_ndarray as ndarray;

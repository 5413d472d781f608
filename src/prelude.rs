//! The traits and types that most programs need, whatever the backend.

pub use trainable_tokens_core::{
    Adam, AdamConfig, DeltaStore, EmbeddingSource, HostTable, LayerOptions, MergeCheck, OptimizerHook,
    Overlap, RowOptimizer, Sgd, SgdConfig, TokenId, TokenRows, TokenSet, WriteRows,
};

#[cfg(feature = "ndarray")]
pub use trainable_tokens_ndarray::TrainableTokensExt;

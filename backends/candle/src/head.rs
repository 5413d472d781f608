//! The output layer that shares an embedding's table.

use std::sync::{Arc, PoisonError, RwLock};

use candle_core::Tensor;
use candle_nn::Module;
use trainable_tokens_core::{EmbeddingSource, TokenSet};

use crate::linear::check_bias;
use crate::ops::{Overrides, project};
use crate::{CandleDelta, CandleTable, Result};

/// Whether a layer's rows are written into its table, seen by every head of the layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Merged(Arc<RwLock<bool>>);

impl Merged {
    /// Runs `work`, which must not see a merge half done, with the state.
    pub(crate) fn read<R>(&self, work: impl FnOnce(bool) -> R) -> R {
        work(*self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `change` alone and sets the state if it succeeds.
    pub(crate) fn set<E>(&self, merged: bool, change: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        change()?;
        *state = merged;
        Ok(())
    }
}

/// The output layer of a model with tied embeddings: `hidden · Wᵀ`, with the columns of trainable tokens computed
/// from the trained rows.
///
/// It holds handles on the layer's table and rows, not copies: it sees every step, merge and unmerge of the
/// [`TrainableTokens`](crate::TrainableTokens) that it came from, which may be stepped while the head exists.
///
/// - While the rows equal the base's, the logits equal those of the frozen head, bit for bit.
/// - The embedding's scale does not apply here; its padding rule neither.
/// - Gradients go to `hidden` and to the trained rows, where candle adds them to those of the embedding's lookup.
/// - A bias is used as it is and never trains.
#[derive(Clone, Debug)]
pub struct TiedHead {
    table: CandleTable,
    delta: CandleDelta,
    /// The ids of the trained rows on the table's device; none if no token trains.
    columns: Option<Tensor>,
    bias: Option<Tensor>,
    merged: Merged,
}

impl TiedHead {
    pub(crate) fn new(
        table: &CandleTable,
        delta: &CandleDelta,
        tokens: &TokenSet,
        merged: &Merged,
    ) -> Result<Self> {
        let columns = (!tokens.is_empty())
            .then(|| Tensor::from_vec(tokens.to_vec(), tokens.len(), table.tensor().device()))
            .transpose()?;
        Ok(Self {
            table: table.clone(),
            delta: delta.clone(),
            columns,
            bias: None,
            merged: merged.clone(),
        })
    }

    /// Adds a bias `[V]` to the logits. It is kept as it is: no gradient, and no change by merging.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's.
    pub fn with_bias(mut self, bias: &Tensor) -> Result<Self> {
        self.bias = Some(check_bias(bias, self.table.tensor())?);
        Ok(self)
    }

    /// Rows of the table: the last dimension of the logits.
    pub fn vocab_size(&self) -> usize {
        self.table.vocab_size()
    }

    /// The logits `[.., V]` of `hidden` `[.., D]`, for any leading dimensions and layout. [`Module::forward`] is the
    /// same with candle's error.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the table's, or candle fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.merged.read(|merged| {
            let table = self.table.tensor();
            let overrides = self
                .columns
                .as_ref()
                .filter(|_| !merged)
                .map(|columns| Overrides::new(table, self.delta.var(), columns.clone()))
                .transpose()?;
            project(hidden, table, self.bias.as_ref(), overrides)
        })
    }
}

impl Module for TiedHead {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.logits(hidden)?)
    }
}

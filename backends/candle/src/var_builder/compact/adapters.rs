//! The adapters of a compact table, by name.

use std::ops::Deref;

use candle_core::Var;
use candle_core::backprop::GradStore;
use trainable_tokens_core::{
    OptimizerHook, Overlap, RowOptimizer, StepReport, TokenAdapter, TokenRows, TokenSet,
};

use super::CompactTable;
use crate::{AdapterMut, Candle, Error, Result};

impl CompactTable {
    /// Makes these adapters the active ones, in place of those that were; with none, ids are sent to the base's rows.
    /// Their tokens must be disjoint.
    ///
    /// # Errors
    ///
    /// For an unknown adapter, one given twice, and a token that two of them train.
    pub fn activate(&mut self, names: &[&str]) -> Result<()> {
        self.layer.activate(names)
    }

    /// Makes these adapters the active ones, with a choice of what counts for tokens that several of them train.
    ///
    /// # Errors
    ///
    /// As [`activate`](Self::activate); [`Error::NoPlaceForMean`] for a mean.
    pub fn activate_overlapping(&mut self, names: &[&str], overlap: Overlap) -> Result<()> {
        if matches!(overlap, Overlap::WeightedMean(_)) {
            return Err(Error::NoPlaceForMean);
        }
        self.layer.activate_overlapping(names, overlap)
    }

    /// Sends every id to the base's row until [`enable`](Self::enable); the active adapters stay the active ones.
    ///
    /// # Errors
    ///
    /// Never: only merged rows could not be left out, and a compact table merges none.
    pub fn disable(&mut self) -> Result<()> {
        self.layer.disable()
    }

    /// Ends what [`disable`](Self::disable) began.
    pub fn enable(&mut self) {
        self.layer.enable();
    }

    /// Names of all adapters, in their order.
    pub fn adapter_names(&self) -> Vec<String> {
        self.layer.adapter_names()
    }

    /// Names of the active adapters, in their order.
    pub fn active_names(&self) -> Vec<String> {
        self.layer.active_names()
    }

    /// The adapter of a name, to read it.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn adapter(&self, name: &str) -> Result<impl Deref<Target = TokenAdapter<Candle>> + use<'_>> {
        self.layer.adapter(name)
    }

    /// The adapter of a name, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn adapter_mut(&mut self, name: &str) -> Result<AdapterMut<'_>> {
        self.layer.adapter_mut(name)
    }

    /// The trainable tokens of the active adapters; for a single one, in slot order.
    pub fn tokens(&self) -> impl Deref<Target = TokenSet> {
        self.layer.tokens()
    }

    /// The trained rows of the one active adapter as candle's variable, `[k, D]`.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active.
    pub fn var(&self) -> Result<Var> {
        self.layer.var()
    }

    /// Copies the trained rows of the one active adapter to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active, or candle fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.layer.rows()
    }

    /// Replaces the trained rows of the one active adapter, converted to their element type.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active, and for rows of another shape.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.layer.set_rows(rows)?;
        self.refresh()
    }

    /// One optimizer step on the rows of the one active adapter, with hooks before and after.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active; [`trainable_tokens_core::Error::NoGradient`] if the backward pass did not
    /// reach the rows; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let report = self.layer.step(gradients, optimizer, hooks)?;
        self.refresh()?;
        Ok(report)
    }
}

//! One adapter of a layer, to change its rows.

use std::ops::Deref;

use candle_core::backprop::GradStore;
use parking_lot::MappedRwLockReadGuard;
use trainable_tokens_core::{
    DeltaStore, Error as CoreError, OptimizerHook, RowOptimizer, StepReport, TokenAdapter, TokenRows,
    step_delta,
};

use crate::{Candle, CandleDelta, Result};

/// An adapter of a layer, to step or rewrite its rows; to read it, it is a [`TokenAdapter`].
#[derive(Debug)]
pub struct AdapterMut<'a> {
    // Rows change through a handle on their variable: heads, which a hook may use, can read the layer all the while.
    adapter: MappedRwLockReadGuard<'a, TokenAdapter<Candle>>,
}

impl<'a> AdapterMut<'a> {
    pub(crate) fn new(adapter: MappedRwLockReadGuard<'a, TokenAdapter<Candle>>) -> Self {
        Self { adapter }
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        let mut delta = self.unmerged()?;
        delta.write(&rows.to_dtype(delta.dtype()))
    }

    /// One optimizer step on the rows, with hooks before and after.
    ///
    /// # Errors
    ///
    /// As [`TokenAdapter::gradient`]; while merged; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let gradient = self.gradient(gradients)?;
        self.step_with(gradient, optimizer, hooks)
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// For a gradient of another shape; while merged; those of the optimizer and the hooks.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let mut delta = self.unmerged()?;
        step_delta(optimizer, hooks, self.tokens(), &mut delta, gradient)
    }

    fn unmerged(&self) -> Result<CandleDelta> {
        if self.is_merged() {
            let adapter = self.name().to_owned();
            return Err(CoreError::AlreadyMerged { adapter }.into());
        }
        Ok(self.delta().clone())
    }
}

impl Deref for AdapterMut<'_> {
    type Target = TokenAdapter<Candle>;

    fn deref(&self) -> &TokenAdapter<Candle> {
        &self.adapter
    }
}

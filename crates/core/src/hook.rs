//! Hooks around an optimizer step.

mod clip;
mod decay;
mod norm;

pub use clip::{ClipGradNorm, joint_norm};
pub use decay::DecayTowardOriginal;
pub use norm::{ClampRowNorm, MatchRowNorm};

use crate::{Result, TokenRows, TokenSet};

/// What a hook sees of a step.
#[derive(Debug)]
pub struct StepContext<'a> {
    /// The number of this step, from 1.
    pub step: u64,
    /// Which token each row belongs to.
    pub tokens: &'a TokenSet,
    /// The trained rows, `[k, D]`.
    pub rows: &'a mut TokenRows,
    /// Their gradient, `[k, D]`.
    pub gradient: &'a mut TokenRows,
    /// The learning rate of this step.
    pub learning_rate: f64,
}

/// Something to do before or after each optimizer step: clip, decay, freeze, reduce across ranks, measure.
///
/// # Contract
///
/// 1. Hooks run in the order given, before the update and again, in the same order, after it.
/// 2. `before_step` may change rows, gradient and learning rate of this step; `after_step` may change the rows.
///    The learning rate falls back to the optimizer's own afterwards.
/// 3. Shapes and element types stay as they are, or the step fails.
/// 4. An error of `before_step` cancels the update, and the rows are as before the step. An error of `after_step`
///    leaves the updated rows.
pub trait OptimizerHook {
    /// Runs before the update.
    ///
    /// # Errors
    ///
    /// Whatever the hook refuses; the update does not happen then.
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        let _ = context;
        Ok(())
    }

    /// Runs after the update.
    ///
    /// # Errors
    ///
    /// Whatever the hook refuses.
    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        let _ = context;
        Ok(())
    }
}

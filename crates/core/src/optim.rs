//! Optimizers over rows, the same in every backend.

mod adam;
mod sgd;
mod state;

pub use adam::{Adam, AdamConfig, Decay};
pub use sgd::{Sgd, SgdConfig};
pub use state::OptimizerState;

use std::borrow::Cow;

use crate::{DeltaStore, Error, OptimizerHook, Result, StepContext, TokenRows, TokenSet};

/// An update rule for trained rows on the host, and its memory.
///
/// The formulas and their order of rounding are torch's (`torch/optim/sgd.py`, `torch/optim/adam.py`,
/// single-tensor form): for rows of half precision every operation rounds, and the memory has the rows' type. (torch's
/// kernels for half precision round some scalars otherwise, so that single elements can be a unit apart there.)
///
/// # Contract
///
/// 1. Dense: every row moves at every step, by momentum, moments and decay, whether its token occurred or not.
/// 2. Deterministic: equal rows, gradients, learning rates and state give equal bits, whatever the backend.
/// 3. [`state`](Self::state) and [`load_state`](Self::load_state) are exact inverses: a loaded optimizer goes on
///    bit for bit.
/// 4. A refused step or state changes nothing.
pub trait RowOptimizer {
    /// Updates `rows` `[k, D]` from `gradient` `[k, D]` (of any element type) with learning rate `lr`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if rows and gradient do not have one shape, [`Error::OptimizerState`] if the state has
    /// another, [`Error::Hyperparameter`] for a learning rate that is not a number of at least 0.
    fn step(&mut self, rows: &mut TokenRows, gradient: &TokenRows, lr: f64) -> Result<()>;
    /// The learning rate that steps use unless a hook changes it.
    fn learning_rate(&self) -> f64;
    /// Changes the learning rate (a schedule does, before each step).
    fn set_learning_rate(&mut self, lr: f64);
    /// How many steps were taken.
    fn steps_taken(&self) -> u64;
    /// Copies the memory, by torch's names.
    fn state(&self) -> OptimizerState;
    /// Replaces the memory.
    ///
    /// # Errors
    ///
    /// [`Error::OptimizerState`] if a tensor is missing or does not fit the others.
    fn load_state(&mut self, state: OptimizerState) -> Result<()>;
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// L2 norm of the gradient of all rows, before the hooks.
    pub grad_norm: f64,
    /// The learning rate that was used.
    pub learning_rate: f64,
}

/// One step on rows: hooks before, update, hooks after, each in order.
///
/// # Errors
///
/// Those of the hooks and the optimizer, and for a hook that changes a shape or an element type. Up to the update
/// the rows are as before then, whatever the hooks made of them; an error of a hook after the update leaves the
/// updated rows.
pub fn step_rows(
    optimizer: &mut dyn RowOptimizer,
    hooks: &mut [&mut dyn OptimizerHook],
    tokens: &TokenSet,
    rows: &mut TokenRows,
    gradient: &mut TokenRows,
) -> Result<StepReport> {
    if hooks.is_empty() {
        return step_plainly(optimizer, rows, gradient);
    }
    gradient.expect_shape("gradient", rows.num_rows(), rows.embedding_dim())?;
    let grad_norm = gradient.norm();
    let step = optimizer.steps_taken().saturating_add(1);
    // What an error goes back to.
    let mut kept = rows.clone();
    let mut context = StepContext {
        step,
        tokens,
        rows,
        gradient,
        learning_rate: optimizer.learning_rate(),
    };
    let result = hooked_step(optimizer, hooks, &mut context, &mut kept);
    if result.is_err() {
        *context.rows = kept;
    }
    Ok(StepReport {
        step,
        grad_norm,
        learning_rate: result?,
    })
}

/// A step without hooks: nothing but the update changes rows, and it does so last.
fn step_plainly(
    optimizer: &mut dyn RowOptimizer,
    rows: &mut TokenRows,
    gradient: &TokenRows,
) -> Result<StepReport> {
    gradient.expect_shape("gradient", rows.num_rows(), rows.embedding_dim())?;
    let learning_rate = optimizer.learning_rate();
    let report = StepReport {
        step: optimizer.steps_taken().saturating_add(1),
        grad_norm: gradient.norm(),
        learning_rate,
    };
    optimizer.step(rows, gradient, learning_rate)?;
    Ok(report)
}

/// The step itself; returns the learning rate that the update used.
fn hooked_step(
    optimizer: &mut dyn RowOptimizer,
    hooks: &mut [&mut dyn OptimizerHook],
    context: &mut StepContext<'_>,
    kept: &mut TokenRows,
) -> Result<f64> {
    let shape = context.rows.shape();
    let (dtype, gradient_dtype) = (context.rows.dtype(), context.gradient.dtype());
    let unchanged = |context: &StepContext<'_>| {
        let parts = [
            ("rows", &*context.rows, dtype),
            ("gradient", &*context.gradient, gradient_dtype),
        ];
        for (what, part, expected) in parts {
            part.expect_shape(what, shape[0], shape[1])?;
            part.expect_dtype(what, expected)?;
        }
        Ok::<(), Error>(())
    };
    for hook in &mut *hooks {
        hook.before_step(context)?;
        unchanged(context)?;
    }
    let learning_rate = context.learning_rate;
    optimizer.step(context.rows, context.gradient, learning_rate)?;
    for hook in hooks {
        kept.clone_from(context.rows);
        hook.after_step(context)?;
        unchanged(context)?;
    }
    Ok(learning_rate)
}

/// [`step_rows`] on the rows of a store.
///
/// # Errors
///
/// Those of [`step_rows`] and of the store.
pub fn step_delta<D: DeltaStore>(
    optimizer: &mut dyn RowOptimizer,
    hooks: &mut [&mut dyn OptimizerHook],
    tokens: &TokenSet,
    delta: &mut D,
    gradient: TokenRows,
) -> Result<StepReport, D::Error> {
    step_store(optimizer, hooks, tokens, delta, Cow::Owned(gradient))
}

/// [`step_delta`], from a gradient that is copied only if there are hooks to change it.
pub(crate) fn step_store<D: DeltaStore>(
    optimizer: &mut dyn RowOptimizer,
    hooks: &mut [&mut dyn OptimizerHook],
    tokens: &TokenSet,
    delta: &mut D,
    mut gradient: Cow<'_, TokenRows>,
) -> Result<StepReport, D::Error> {
    let mut report = Ok(StepReport::default());
    delta.update(&mut |rows| {
        // An error is no reason to lose rows that were updated before it.
        report = if hooks.is_empty() {
            step_plainly(optimizer, rows, &gradient)
        } else {
            step_rows(optimizer, hooks, tokens, rows, gradient.to_mut())
        };
        Ok(())
    })?;
    Ok(report?)
}

/// Refuses a hyper-parameter that is not finite or fails `holds`.
fn check(name: &'static str, value: f64, must: &'static str, holds: bool) -> Result<()> {
    if holds && value.is_finite() {
        Ok(())
    } else {
        Err(Error::Hyperparameter { name, value, must })
    }
}

/// Brings a gradient to the rows' type, without a copy if it has it.
fn gradient_like<'a>(rows: &TokenRows, gradient: &'a TokenRows) -> Result<Cow<'a, TokenRows>> {
    gradient.expect_shape("gradient", rows.num_rows(), rows.embedding_dim())?;
    Ok(gradient.like_dtype(rows.dtype()))
}

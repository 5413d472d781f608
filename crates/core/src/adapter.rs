//! One adapter of a layer: a token set with rows of its own.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::optim::step_store;
use crate::{
    Backend, DeltaStore, Error, OptimizerHook, Result, RowOptimizer, StepReport, TokenRows, TokenSet,
};

/// The name of the adapter that a layer starts with, as in PEFT.
pub(crate) const DEFAULT: &str = "default";

/// A set of tokens of a layer's table with the rows that train for them, under a name.
///
/// Two adapters of a layer have nothing in common but the table: their rows are leaves of their own, and one's step
/// leaves the other's alone.
pub struct TokenAdapter<B: Backend> {
    name: Arc<str>,
    tokens: TokenSet,
    delta: B::Delta,
    /// Whether the rows are in the table.
    merged: bool,
}

impl<B: Backend> TokenAdapter<B> {
    /// Names rows that the framework holds already, one for each token. For rows on the host see
    /// [`TrainableTokens::add_adapter_with_rows`](crate::TrainableTokens::add_adapter_with_rows).
    ///
    /// # Errors
    ///
    /// [`Error::AdapterName`] for what cannot be a name.
    pub fn new(name: &str, tokens: TokenSet, delta: B::Delta) -> Result<Self> {
        Ok(Self {
            name: checked_name(name)?,
            tokens,
            delta,
            merged: false,
        })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.name
    }

    /// The trainable tokens, in slot order.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// The trained rows, as the framework's leaf.
    pub fn delta(&self) -> &B::Delta {
        &self.delta
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        self.merged
    }

    pub(crate) fn set_merged(&mut self, merged: bool) {
        self.merged = merged;
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    pub fn rows(&self) -> Result<TokenRows, B::Error> {
        self.delta.read()
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], [`Error::AlreadyMerged`]; the backend's errors.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<(), B::Error> {
        self.expect_unmerged()?;
        let rows = rows.to_dtype(self.delta.dtype());
        self.delta.write(&rows)
    }

    /// The gradient of the trained rows, `[k, D]`; zeros if no token trains.
    ///
    /// # Errors
    ///
    /// [`Error::NoGradient`] if the backward pass did not reach the rows: a cut graph, an adapter that no lookup and no
    /// head used, or one that is merged.
    pub fn gradient(&self, gradients: &B::Gradients) -> Result<TokenRows, B::Error> {
        Ok(self.lent_gradient(gradients)?.into_owned())
    }

    fn lent_gradient<'a>(&self, gradients: &'a B::Gradients) -> Result<Cow<'a, TokenRows>, B::Error> {
        if self.tokens.is_empty() {
            let dim = self.delta.embedding_dim();
            return Ok(Cow::Owned(TokenRows::zeros(self.delta.dtype(), 0, dim)));
        }
        B::lend_gradient(gradients, &self.delta)?.ok_or_else(|| Error::NoGradient.into())
    }

    /// One optimizer step on the rows from the framework's gradients, with hooks before and after.
    ///
    /// # Errors
    ///
    /// [`Error::NoGradient`], [`Error::AlreadyMerged`]; those of the optimizer, the hooks and the backend.
    pub fn step(
        &mut self,
        gradients: &B::Gradients,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport, B::Error> {
        let gradient = self.lent_gradient(gradients)?;
        self.step_from(gradient, optimizer, hooks)
    }

    /// One optimizer step on the rows from a gradient on the host, with hooks before and after.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyMerged`]; those of the optimizer, the hooks and the backend.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport, B::Error> {
        self.step_from(Cow::Owned(gradient), optimizer, hooks)
    }

    fn step_from(
        &mut self,
        gradient: Cow<'_, TokenRows>,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport, B::Error> {
        self.expect_unmerged()?;
        step_store(optimizer, hooks, &self.tokens, &mut self.delta, gradient)
    }

    /// Gives up the adapter for its tokens and rows.
    pub fn into_parts(self) -> (TokenSet, B::Delta) {
        (self.tokens, self.delta)
    }

    /// Refuses rows that are not one of length `dim` for each token.
    pub(crate) fn expect_rows(&self, dim: usize) -> Result<()> {
        let expected = [self.tokens.len(), dim];
        let got = [self.delta.num_rows(), self.delta.embedding_dim()];
        if expected == got {
            return Ok(());
        }
        Err(Error::shape("trained rows", &expected, &got))
    }

    pub(crate) fn expect_unmerged(&self) -> Result<()> {
        if self.is_merged() {
            let adapter = self.name.to_string();
            return Err(Error::AlreadyMerged { adapter });
        }
        Ok(())
    }
}

impl<B: Backend> fmt::Debug for TokenAdapter<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenAdapter")
            .field("name", &self.name)
            .field("tokens", &self.tokens)
            .field("merged", &self.merged)
            .finish_non_exhaustive()
    }
}

/// A name must be possible as PEFT's and as a directory's.
fn checked_name(name: &str) -> Result<Arc<str>> {
    if name.is_empty() || name.contains(['.', '/', '\\']) || name.contains(char::is_control) {
        return Err(Error::AdapterName {
            name: name.to_owned(),
            must: "at least one character, without dots, slashes and control characters",
        });
    }
    Ok(name.into())
}

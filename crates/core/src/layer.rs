//! The layer, written once over a backend.

use crate::{
    Backend, DeltaStore, EmbeddingSource, Error, LayerOptions, LookupPlan, OptimizerHook, RowOptimizer,
    RowTransform, StepReport, TokenRows, TokenSet, UndoJournal, WriteRows, step_delta,
};

/// A frozen table of which the rows of a [`TokenSet`] train.
///
/// The same layer serves the input embedding ([`lookup`](Self::lookup)), a head tied to it
/// ([`logits`](Self::logits)), and an untied head (a layer of its own over the head's table).
///
/// # Contract
///
/// 1. A new layer is a no-op: every output equals the frozen base's, bit for bit.
/// 2. Nothing but [`merge`](Self::merge) and [`unmerge`](Self::unmerge) writes the base.
/// 3. While merged, outputs come from the base alone and no gradient reaches the rows.
/// 4. `unmerge` restores the exact bits that `merge` overwrote.
#[derive(Debug)]
pub struct TrainableTokens<B: Backend> {
    source: B::Source,
    delta: B::Delta,
    tokens: TokenSet,
    options: LayerOptions,
    journal: UndoJournal,
}

impl<B: Backend> TrainableTokens<B> {
    /// Starts from the base's own rows (PEFT's `init_weights=True`), in the type of
    /// [`DType::default_row_dtype`](crate::DType::default_row_dtype).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `tokens` was validated against another vocabulary size; the backend's errors.
    pub fn new(source: B::Source, tokens: TokenSet) -> Result<Self, B::Error> {
        let dtype = source.dtype().default_row_dtype();
        let rows = source.read_rows(tokens.ids())?.to_dtype(dtype);
        Self::with_rows(source, tokens, &rows)
    }

    /// Starts from given rows, `[k, D]` in slot order; they train in their own element type.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the rows or the vocabulary do not fit the table; the backend's errors.
    pub fn with_rows(source: B::Source, tokens: TokenSet, rows: &TokenRows) -> Result<Self, B::Error> {
        if tokens.vocab_size() != source.vocab_size() {
            return Err(Error::shape(
                "vocabulary of the token set",
                &[source.vocab_size()],
                &[tokens.vocab_size()],
            )
            .into());
        }
        rows.expect_shape("trained rows", tokens.len(), source.embedding_dim())?;
        let delta = B::delta(&source, rows)?;
        Ok(Self {
            source,
            delta,
            tokens,
            options: LayerOptions::default(),
            journal: UndoJournal::default(),
        })
    }

    /// Sets padding, scale and the other ways in which the table is used.
    #[must_use]
    pub fn with_options(mut self, options: LayerOptions) -> Self {
        self.options = options;
        self
    }

    /// The frozen table.
    pub fn source(&self) -> &B::Source {
        &self.source
    }

    /// The trained rows, as the framework's leaf.
    pub fn delta(&self) -> &B::Delta {
        &self.delta
    }

    /// The trainable tokens.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// Padding, scale and the other ways in which the table is used.
    pub fn options(&self) -> LayerOptions {
        self.options
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        !self.journal.is_empty()
    }

    /// Plans a batch of flattened `input_ids`, for [`lookup_planned`](Self::lookup_planned).
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`].
    pub fn plan(&self, input_ids: &[u32]) -> crate::Result<LookupPlan> {
        LookupPlan::new(&self.tokens, self.options, input_ids)
    }

    /// The rows of a batch: `[N, D]` in the table's element type, scaled.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`]; the backend's errors.
    pub fn lookup(&self, input_ids: &[u32]) -> Result<B::Tensor, B::Error> {
        self.lookup_planned(&self.plan(input_ids)?)
    }

    /// The rows of a planned batch: `[N, D]` in the table's element type, scaled.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPlan`] if the plan was made for another token set; the backend's errors.
    pub fn lookup_planned(&self, plan: &LookupPlan) -> Result<B::Tensor, B::Error> {
        plan.expect_tokens(&self.tokens)?;
        B::lookup(&self.source, self.active(), plan, self.transform())
    }

    /// The logits of a head that shares the table: `hidden` `[N, D]` to `[N, V]`, never scaled.
    ///
    /// # Errors
    ///
    /// When the shapes do not fit or the framework fails.
    pub fn logits(&self, hidden: B::Tensor) -> Result<B::Tensor, B::Error> {
        B::logits(hidden, &self.source, self.active(), &self.tokens)
    }

    /// What [`lookup`](Self::lookup) does to each row after the override, its factor rounded as the options say.
    pub fn transform(&self) -> RowTransform {
        self.options.transform(self.source.dtype())
    }

    /// The delta, unless the table already holds it or there is none.
    pub fn active(&self) -> Option<&B::Delta> {
        (!self.is_merged() && !self.tokens.is_empty()).then_some(&self.delta)
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
    /// [`Error::NoGradient`] if the backward pass did not reach the rows (a cut graph, or a merged layer).
    pub fn gradient(&self, gradients: &B::Gradients) -> Result<TokenRows, B::Error> {
        if self.tokens.is_empty() {
            return Ok(TokenRows::zeros(
                self.delta.dtype(),
                0,
                self.source.embedding_dim(),
            ));
        }
        B::gradient(gradients, &self.delta)?.ok_or_else(|| Error::NoGradient.into())
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
        let gradient = self.gradient(gradients)?;
        self.step_with(gradient, optimizer, hooks)
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
        self.expect_unmerged()?;
        step_delta(optimizer, hooks, &self.tokens, &mut self.delta, gradient)
    }

    /// Gives up the layer for its table, as it is now (merged or not).
    pub fn into_source(self) -> B::Source {
        self.source
    }

    fn expect_unmerged(&self) -> crate::Result<()> {
        if self.is_merged() {
            Err(Error::AlreadyMerged)
        } else {
            Ok(())
        }
    }
}

impl<B: Backend<Source: WriteRows>> TrainableTokens<B> {
    /// Writes the rows into the table, rounded to its element type (PEFT's `merge`); the old rows are kept.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyMerged`]; the table's errors.
    pub fn merge(&mut self) -> Result<(), B::Error> {
        self.expect_unmerged()?;
        let rows = self.delta.read()?;
        self.journal.apply(&mut self.source, self.tokens.ids(), &rows)
    }

    /// Restores the exact rows that [`merge`](Self::merge) overwrote.
    ///
    /// # Errors
    ///
    /// [`Error::NotMerged`]; the table's errors.
    pub fn unmerge(&mut self) -> Result<(), B::Error> {
        self.journal.undo(&mut self.source)
    }
}

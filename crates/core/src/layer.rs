//! The layer, written once over a backend.

mod adapters;
mod merge;
mod mixed;
mod parts;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

pub use merge::MergeCheck;
pub use mixed::MixedPart;
pub use parts::{KnownActive, LayerParts, MergeParts};

#[cfg(doc)]
use crate::Error;
use crate::active::{ActiveSet, NamedTokens};
use crate::adapter::{DEFAULT, TokenAdapter};
use crate::{
    Backend, CrossEntropyOptions, CrossEntropyPlan, EmbeddingSource, LayerOptions, LookupPlan, OptimizerHook,
    Overlap, RowOptimizer, RowTransform, StepReport, TokenRows, TokenSet, UndoJournal,
};

/// A frozen table of which the rows of some tokens train.
///
/// The same layer serves the input embedding ([`lookup`](Self::lookup)), a head tied to it
/// ([`logits`](Self::logits)), and an untied head (a layer of its own over the head's table, with tokens of its own).
///
/// The rows belong to [adapters](TokenAdapter), by name. [`new`](Self::new) makes one, called `default`, and activates it;
/// a layer with only that one needs no other word about adapters. See [`add_adapter`](Self::add_adapter) for more of
/// them, [`activate`](Self::activate) for several at once, and [`lookup_mixed`](Self::lookup_mixed) for one per example.
///
/// # Contract
///
/// 1. A new layer is a no-op: every output equals the frozen base's, bit for bit.
/// 2. Nothing but merging and unmerging writes the base.
/// 3. Outputs are those of the table as it is, merged rows included, with the rows of the active adapters that are not
///    merged in their places. No gradient reaches the rows of a merged or inactive adapter.
/// 4. `unmerge` restores the exact bits that the latest merge overwrote.
/// 5. Adapters, the active ones, enabled or disabled, and merged or not change only by the calls that say so. A call that
///    fails changes none of them.
pub struct TrainableTokens<B: Backend> {
    source: B::Source,
    options: LayerOptions,
    adapters: Vec<TokenAdapter<B>>,
    /// Names of the active adapters, in their order.
    active: Vec<Arc<str>>,
    overlap: Overlap,
    enabled: bool,
    /// What outputs are made with; follows from the fields above.
    effective: Effective,
    /// What is known about active adapters from before.
    known: KnownActive,
    journal: UndoJournal,
    /// The adapters of each entry of the journal.
    merges: Vec<Vec<Arc<str>>>,
}

/// The active adapters that are not merged, or all active ones if none is left.
#[derive(Clone, Debug)]
enum Effective {
    /// No adapter is active: no tokens.
    None(TokenSet),
    /// The adapter at this place alone.
    One(usize),
    /// The adapters at these places together.
    Several(Vec<usize>, Arc<ActiveSet>),
}

/// The rows that outputs are made with: an adapter's own, or a combination of several made for one call.
#[derive(Debug)]
pub enum ActiveRows<'a, D> {
    /// The rows of one adapter.
    Leaf(&'a D),
    /// Those of several.
    Combined(D),
}

impl<D> Deref for ActiveRows<'_, D> {
    type Target = D;

    fn deref(&self) -> &D {
        match self {
            Self::Leaf(delta) => delta,
            Self::Combined(delta) => delta,
        }
    }
}

impl<B: Backend> TrainableTokens<B> {
    /// Starts with one active adapter, `default`, from the base's own rows (PEFT's `init_weights=True`), in the type of
    /// [`DType::default_row_dtype`](crate::DType::default_row_dtype).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `tokens` was validated against another vocabulary size; the backend's errors.
    pub fn new(source: B::Source, tokens: TokenSet) -> Result<Self, B::Error> {
        let mut layer = Self::frozen(source)?;
        layer.add_adapter(DEFAULT, tokens)?;
        layer.activate(&[DEFAULT])?;
        Ok(layer)
    }

    /// Starts with one active adapter, `default`, from given rows, `[k, D]` in slot order; they train in their own
    /// element type.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the rows or the vocabulary do not fit the table; the backend's errors.
    pub fn with_rows(source: B::Source, tokens: TokenSet, rows: &TokenRows) -> Result<Self, B::Error> {
        let mut layer = Self::frozen(source)?;
        layer.add_adapter_with_rows(DEFAULT, tokens, rows)?;
        layer.activate(&[DEFAULT])?;
        Ok(layer)
    }

    /// Starts without any adapter.
    ///
    /// # Errors
    ///
    /// [`Error::VocabularyTooLarge`].
    pub fn frozen(source: B::Source) -> Result<Self, B::Error> {
        let none = TokenSet::new([], source.vocab_size())?;
        Ok(Self {
            source,
            options: LayerOptions::default(),
            adapters: Vec::new(),
            active: Vec::new(),
            overlap: Overlap::Refuse,
            enabled: true,
            effective: Effective::None(none),
            known: KnownActive::default(),
            journal: UndoJournal::default(),
            merges: Vec::new(),
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

    /// Padding, scale and the other ways in which the table is used.
    pub fn options(&self) -> LayerOptions {
        self.options
    }

    /// The tokens whose rows outputs are made with: those of the active adapters that are not merged, or of all active
    /// ones if none is left. For a single adapter they are its own, in slot order.
    pub fn tokens(&self) -> &TokenSet {
        match &self.effective {
            Effective::None(tokens) => tokens,
            Effective::One(at) => self.adapters[*at].tokens(),
            Effective::Several(_, set) => &set.tokens,
        }
    }

    /// The rows for [`tokens`](Self::tokens), unless there are none, the table already holds them, or the adapters are
    /// disabled.
    ///
    /// # Errors
    ///
    /// When the framework fails to combine the rows of several adapters.
    pub fn active(&self) -> Result<Option<ActiveRows<'_, B::Delta>>, B::Error> {
        let live = |at: &usize| self.enabled && !self.adapters[*at].is_merged();
        match &self.effective {
            _ if self.tokens().is_empty() => Ok(None),
            Effective::One(at) if live(at) => Ok(Some(ActiveRows::Leaf(self.adapters[*at].delta()))),
            Effective::Several(places, set) if places.iter().all(live) => {
                let deltas: Vec<_> = places.iter().map(|at| self.adapters[*at].delta()).collect();
                Ok(Some(ActiveRows::Combined(B::combine(&deltas, &set.mix)?)))
            }
            _ => Ok(None),
        }
    }

    /// Plans a batch of flattened `input_ids`, for [`lookup_planned`](Self::lookup_planned).
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`].
    pub fn plan(&self, input_ids: &[u32]) -> crate::Result<LookupPlan> {
        LookupPlan::new(self.tokens(), self.options, input_ids)
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
    /// [`Error::ForeignPlan`] if the plan was made for other tokens; for a mixed batch also [`Error::AlreadyMerged`] and
    /// [`Error::Disabled`]; the backend's errors.
    pub fn lookup_planned(&self, plan: &LookupPlan) -> Result<B::Tensor, B::Error> {
        let rows = self.rows_for(plan)?;
        B::lookup(&self.source, rows.as_deref(), plan, self.transform())
    }

    /// The logits of a head that shares the table: `hidden` `[N, D]` to `[N, V]`, never scaled.
    ///
    /// # Errors
    ///
    /// When the shapes do not fit or the framework fails.
    pub fn logits(&self, hidden: B::Tensor) -> Result<B::Tensor, B::Error> {
        B::logits(hidden, &self.source, self.active()?.as_deref(), self.tokens())
    }

    /// The cross-entropy `[1, 1]` of that head for `hidden` `[N, D]` and a label for each of its rows, of which there is
    /// never more than a chunk of logits: see [`CrossEntropyPlan`].
    ///
    /// # Errors
    ///
    /// [`Error::LabelOutOfRange`], [`Error::AllIgnored`]; when the shapes do not fit or the framework fails;
    /// [`Error::Unsupported`] where the backend does not have it.
    pub fn linear_cross_entropy(
        &self,
        hidden: B::Tensor,
        labels: &[i64],
        options: CrossEntropyOptions,
    ) -> Result<B::Tensor, B::Error> {
        let plan = CrossEntropyPlan::new(labels, self.source.vocab_size(), options)?;
        let rows = self.active()?;
        B::linear_cross_entropy(hidden, &self.source, rows.as_deref(), self.tokens(), &plan)
    }

    /// What [`lookup`](Self::lookup) does to each row after the override, its factor rounded as the options say.
    pub fn transform(&self) -> RowTransform {
        self.options.transform(self.source.dtype())
    }

    /// The trained rows of the one active adapter, as the framework's leaf.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`].
    pub fn delta(&self) -> crate::Result<&B::Delta> {
        Ok(self.active_adapter()?.delta())
    }

    /// Copies the trained rows of the one active adapter to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`]; when the framework fails.
    pub fn rows(&self) -> Result<TokenRows, B::Error> {
        self.active_adapter()?.rows()
    }

    /// Replaces the trained rows of the one active adapter, converted to their element type.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`]; those of [`TokenAdapter::set_rows`].
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<(), B::Error> {
        self.active_adapter_mut()?.set_rows(rows)
    }

    /// The gradient of the trained rows of the one active adapter, `[k, D]`; zeros if no token trains.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`]; those of [`TokenAdapter::gradient`].
    pub fn gradient(&self, gradients: &B::Gradients) -> Result<TokenRows, B::Error> {
        self.active_adapter()?.gradient(gradients)
    }

    /// One optimizer step on the rows of the one active adapter from the framework's gradients, with hooks before and
    /// after.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`]; those of [`TokenAdapter::step`].
    pub fn step(
        &mut self,
        gradients: &B::Gradients,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport, B::Error> {
        self.active_adapter_mut()?.step(gradients, optimizer, hooks)
    }

    /// One optimizer step on the rows of the one active adapter from a gradient on the host, with hooks before and after.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`]; those of [`TokenAdapter::step_with`].
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport, B::Error> {
        self.active_adapter_mut()?.step_with(gradient, optimizer, hooks)
    }

    /// Gives up the layer for its table, as it is now (merged or not).
    pub fn into_source(self) -> B::Source {
        self.source
    }
}

impl<B: Backend> fmt::Debug for TrainableTokens<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrainableTokens")
            .field("options", &self.options)
            .field("adapters", &self.adapters)
            .field("active", &self.active)
            .field("overlap", &self.overlap)
            .field("enabled", &self.enabled)
            .field("merges", &self.merges)
            .finish_non_exhaustive()
    }
}

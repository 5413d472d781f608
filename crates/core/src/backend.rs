//! What only a tensor framework can know.

use std::borrow::Cow;
use std::ops::Range;

use crate::{
    BackendError, CrossEntropyPlan, DeltaStore, EmbeddingSource, Error, LookupPlan, RowMix, RowTransform,
    TokenRows, TokenSet,
};

/// A tensor framework, seen by the layer: a few operations over its own types.
///
/// # Contract
///
/// 1. *Replacement.* The lookup's row at a position of `plan.positions()` is the row of the delta at that slot,
///    converted to the table's element type; every other row is the base's. No other bit differs from the
///    framework's own lookup in a table whose rows were overwritten by the delta. The transform is applied after
///    the override, to every row alike.
/// 2. *Gradient of the lookup.* Each slot's gradient is the sum of the output's gradient over
///    `plan.grad_positions()` of that slot, times the scale and the plan's factors; `max_norm` counts as the
///    identity. Slots that do not occur get zero, not nothing, in a batch without any trainable token too.
/// 3. *Head.* `logits(hidden)` equals `hidden · Wᵀ` for the table `W` overwritten by the delta. Its gradient for
///    slot `s` is `upstream[:, id(s)]ᵀ · hidden`; its gradient for `hidden` is `upstream · W`.
/// 4. *Frozen base.* No operation gives the base a gradient, or allocates in proportion to `V x D`.
/// 5. *No-op.* With the delta's rows equal to the base's, the lookup equals the framework's own, bit for bit.
/// 6. *Combination.* The rows of `combine(deltas, mix)` are those of [`RowMix::apply`], bit for bit. Gradients of lookups
///    and heads that use them reach every one of `deltas`: zero for rows that the mix leaves out. Later writes to
///    `deltas` need not show in a combination made before.
/// 7. *Rows of values.* `join_rows` of what `split_rows` made is the value again, bit for bit, and gradients pass through
///    both unchanged.
/// 8. *Loss.* `linear_cross_entropy(hidden)` equals the cross-entropy of `logits(hidden)` up to rounding, with the gradients
///    of clause 3, but never holds more than a chunk of the plan's rows of logits.
pub trait Backend {
    /// The backend's error.
    type Error: BackendError;
    /// The frozen table.
    type Source: EmbeddingSource<Error = Self::Error>;
    /// The trained rows.
    type Delta: DeltaStore<Error = Self::Error>;
    /// A two-dimensional value of the framework, a node of its graph where it has one.
    type Tensor;
    /// What the framework's backward pass returns.
    type Gradients;

    /// Makes a trainable leaf of `rows`, where `source` lies (its device).
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn delta(source: &Self::Source, rows: &TokenRows) -> Result<Self::Delta, Self::Error>;

    /// The rows of a batch, `[N, D]` in the table's element type, transformed after the override. Without a delta
    /// it is the plain lookup of the base.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn lookup(
        source: &Self::Source,
        delta: Option<&Self::Delta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Self::Tensor, Self::Error>;

    /// The logits `[N, V]` of `hidden` `[N, D]`. Without a delta it is the plain product with the base.
    ///
    /// # Errors
    ///
    /// When the shapes do not fit or the framework fails.
    fn logits(
        hidden: Self::Tensor,
        source: &Self::Source,
        delta: Option<&Self::Delta>,
        tokens: &TokenSet,
    ) -> Result<Self::Tensor, Self::Error>;

    /// The loss `[1, 1]` of `hidden` `[N, D]` for the labels of `plan`, with the gradients of [`logits`](Self::logits) and
    /// of the plan's softcap and reduction. It is of the compute type of the table's element type, or where values have but
    /// one type rounded to that. Without a delta it is that of the base.
    ///
    /// # Errors
    ///
    /// When the shapes do not fit or the framework fails; [`Error::Unsupported`] where a backend does not have it.
    fn linear_cross_entropy(
        hidden: Self::Tensor,
        source: &Self::Source,
        delta: Option<&Self::Delta>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Self::Tensor, Self::Error> {
        let _ = (hidden, source, delta, tokens, plan);
        let what = "fused linear cross-entropy";
        Err(Error::Unsupported { what }.into())
    }

    /// The rows of several adapters as one value, for [`lookup`](Self::lookup), [`logits`](Self::logits) and
    /// [`linear_cross_entropy`](Self::linear_cross_entropy) alone: it is no leaf, is never written and has no gradient of
    /// its own. The adapters' rows are equally long, and as many as `mix` says.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn combine(deltas: &[&Self::Delta], mix: &RowMix) -> Result<Self::Delta, Self::Error>;

    /// The number of rows of a value.
    fn num_rows(tensor: &Self::Tensor) -> usize;

    /// Cuts a value `[N, M]` into `[parts[i].len(), M]`. The parts are ascending, without gaps, and end at `N`.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn split_rows(tensor: Self::Tensor, parts: &[Range<usize>]) -> Result<Vec<Self::Tensor>, Self::Error>;

    /// Puts values of equally long rows below each other; there is at least one.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn join_rows(parts: Vec<Self::Tensor>) -> Result<Self::Tensor, Self::Error>;

    /// The gradient of the delta, `[k, D]` on the host; `None` if the backward pass did not reach it.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn gradient(gradients: &Self::Gradients, delta: &Self::Delta) -> Result<Option<TokenRows>, Self::Error>;

    /// As [`gradient`](Self::gradient), lent where it lies on the host already: a step without hooks copies nothing then.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn lend_gradient<'a>(
        gradients: &'a Self::Gradients,
        delta: &Self::Delta,
    ) -> Result<Option<Cow<'a, TokenRows>>, Self::Error> {
        Ok(Self::gradient(gradients, delta)?.map(Cow::Owned))
    }
}

//! The layer for ndarray: core's, with forward passes into a caller's buffer and explicit backward passes.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use trainable_tokens_core::{
    CrossEntropyOptions, CrossEntropyPlan, Element, Error, Gather, HostTable, LookupPlan, Result, RowRef,
    RowTransform, Slot, TokenAdapter, TokenId, TokenRows, TokenSet,
};

use crate::loss::{Backward, SharedHead};
use crate::{CrossEntropy, LossBuffers, NdGradient, NdRows, Ndarray, head};

/// A frozen table of which some rows train: core's layer over [`Ndarray`].
pub type TrainableTokens<S, O = f32> = trainable_tokens_core::TrainableTokens<Ndarray<S, O>>;

/// What an explicit framework needs besides core's layer: output buffers and backward passes.
///
/// A plan may be that of a mixed batch; gradients go to the rows of each adapter that the plan used.
pub trait TrainableTokensExt<O: Element> {
    /// The table's error.
    type Error;

    /// The rows of a planned batch, written to `out` of shape `[N, D]`. Allocates nothing, unless several adapters are
    /// combined or `out` is not row-major.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `out` has another shape, [`Error::ForeignPlan`] if the plan belongs to another token set, those
    /// of [`lookup_planned`](trainable_tokens_core::TrainableTokens::lookup_planned); `out` is unchanged.
    fn lookup_into(&self, plan: &LookupPlan, out: ArrayViewMut2<'_, O>) -> Result<(), Self::Error>;

    /// The gradients of the trained rows, `[k, D]` for each adapter, from that of a lookup's output, `[N, D]`. The work
    /// follows the positions that hold a trainable token.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `upstream` has another shape, [`Error::NoGradient`] while the rows are merged or disabled.
    fn backward(&self, plan: &LookupPlan, upstream: ArrayView2<'_, O>) -> Result<NdGradient, Self::Error>;

    /// As [`backward`](Self::backward), added into `gradients`. Allocates nothing if `upstream` is row-major, the plan
    /// is for one adapter, and `gradients` has its gradient already.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`](trainable_tokens_core::Error::DType) if something does not fit,
    /// [`Error::NoGradient`] while the rows are merged or disabled.
    fn backward_into(
        &self,
        plan: &LookupPlan,
        upstream: ArrayView2<'_, O>,
        gradients: &mut NdGradient,
    ) -> Result<(), Self::Error>;

    /// The gradients of a tied head: that of `hidden`, returned as `[N, D]`, and those of the trained rows, added
    /// into `gradients`, from that of the logits, `[N, V]`. While the rows are merged or disabled they have none, and
    /// `gradients` stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`](trainable_tokens_core::Error::DType) if something does not fit.
    fn logits_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        gradients: &mut NdGradient,
    ) -> Result<Array2<O>, Self::Error>;

    /// As [`logits_backward`](Self::logits_backward), for
    /// [`logits_mixed`](trainable_tokens_core::TrainableTokens::logits_mixed).
    ///
    /// # Errors
    ///
    /// Those of [`logits_backward`](Self::logits_backward) and of `logits_mixed`.
    fn logits_mixed_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        adapters: &[Option<&str>],
        gradients: &mut NdGradient,
    ) -> Result<Array2<O>, Self::Error>;

    /// The cross-entropy of a tied head for a label per row of `hidden` `[N, D]`, with its gradients. There is never more
    /// than a chunk of logits, as the options say; a row whose label is ignored costs nothing.
    ///
    /// # Errors
    ///
    /// [`Error::LabelOutOfRange`], [`Error::AllIgnored`]; [`Error::Shape`] if something does not fit.
    fn cross_entropy(
        &self,
        hidden: ArrayView2<'_, O>,
        labels: &[i64],
        options: CrossEntropyOptions,
    ) -> Result<CrossEntropy<O>, Self::Error>;

    /// As [`cross_entropy`](Self::cross_entropy), in the memory of `buffers`: returns the loss, writes the gradient of
    /// `upstream` times the loss to `hidden_gradient` `[N, D]`, zeros where the label is ignored, and adds that of the
    /// trained rows into `gradients`. While the rows are merged or disabled they have none.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`](trainable_tokens_core::Error::DType) if something does not fit.
    fn cross_entropy_into(
        &self,
        plan: &CrossEntropyPlan,
        hidden: ArrayView2<'_, O>,
        upstream: f64,
        hidden_gradient: ArrayViewMut2<'_, O>,
        gradients: &mut NdGradient,
        buffers: &mut LossBuffers<O>,
    ) -> Result<f64, Self::Error>;

    /// Zero gradients of the rows that train, for the passes above.
    fn zero_gradient(&self) -> NdGradient;
}

impl<S: HostTable, O: Element> TrainableTokensExt<O> for TrainableTokens<S, O> {
    type Error = S::Error;

    fn lookup_into(&self, plan: &LookupPlan, mut out: ArrayViewMut2<'_, O>) -> Result<(), S::Error> {
        let (source, dim) = (self.source(), self.source().embedding_dim());
        let expected = [plan.len(), dim];
        if out.shape() != expected {
            return Err(Error::shape("output of the lookup", &expected, out.shape()).into());
        }
        let active = self.rows_for(plan)?;
        let delta = active.as_deref().map(NdRows::rows);
        let rows = gather(source, delta, plan, self.transform());
        if let Some(out) = out.as_slice_mut() {
            return Ok(rows.write_from(0, out)?);
        }
        let mut buffer = vec![O::default(); dim];
        for (position, mut out) in out.outer_iter_mut().enumerate() {
            rows.write_from(position, &mut buffer)?;
            out.iter_mut().zip(&buffer).for_each(|(out, value)| *out = *value);
        }
        Ok(())
    }

    fn backward(&self, plan: &LookupPlan, upstream: ArrayView2<'_, O>) -> Result<NdGradient, S::Error> {
        let mut gradients = NdGradient::default();
        self.backward_into(plan, upstream, &mut gradients)?;
        Ok(gradients)
    }

    fn backward_into(
        &self,
        plan: &LookupPlan,
        upstream: ArrayView2<'_, O>,
        gradients: &mut NdGradient,
    ) -> Result<(), S::Error> {
        let active = self.rows_for(plan)?;
        let expected = [plan.len(), self.source().embedding_dim()];
        if upstream.shape() != expected {
            return Err(Error::shape("gradient of the lookup", &expected, upstream.shape()).into());
        }
        let Some(active) = active else {
            return match plan.num_slots() {
                0 => Ok(()),
                _ => Err(Error::NoGradient.into()),
            };
        };
        let upstream = upstream.as_standard_layout();
        let upstream = upstream.as_slice().unwrap_or_default();
        let scale = self.transform().scale;
        Ok(gradients.add(active.host(), O::Compute::DTYPE, |gradient| {
            plan.accumulate(upstream, scale, gradient)
        })?)
    }

    fn logits_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        gradients: &mut NdGradient,
    ) -> Result<Array2<O>, S::Error> {
        let active = self.active()?;
        let delta = active.as_deref().map(NdRows::host);
        let (source, tokens) = (self.source(), self.tokens());
        Ok(head::logits_backward(
            &hidden, &upstream, source, delta, tokens, gradients,
        )?)
    }

    fn logits_mixed_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        adapters: &[Option<&str>],
        gradients: &mut NdGradient,
    ) -> Result<Array2<O>, S::Error> {
        let source = self.source();
        let none = TokenSet::new([], source.vocab_size())?;
        let parts = self.mixed_parts(hidden.nrows(), adapters)?;
        if upstream.nrows() != hidden.nrows() {
            let (expected, got) = ([hidden.nrows()], [upstream.nrows()]);
            return Err(Error::shape("gradient of the logits", &expected, &got).into());
        }
        let mut out = Array2::from_elem(hidden.raw_dim(), O::default());
        for (rows, adapter) in parts {
            let rows = s![rows, ..];
            let (hidden, upstream) = (hidden.slice(rows), upstream.slice(rows));
            let tokens = adapter.map_or(&none, TokenAdapter::tokens);
            let delta = adapter.filter(|_| !tokens.is_empty());
            let delta = delta.map(|adapter| adapter.delta().host());
            let part = head::logits_backward(&hidden, &upstream, source, delta, tokens, gradients)?;
            out.slice_mut(rows).assign(&part);
        }
        Ok(out)
    }

    fn cross_entropy(
        &self,
        hidden: ArrayView2<'_, O>,
        labels: &[i64],
        options: CrossEntropyOptions,
    ) -> Result<CrossEntropy<O>, S::Error> {
        let plan = CrossEntropyPlan::new(labels, self.source().vocab_size(), options)?;
        let mut hidden_gradient = Array2::from_elem(hidden.raw_dim(), O::default());
        let (mut rows, mut buffers) = (NdGradient::default(), LossBuffers::default());
        let view = hidden_gradient.view_mut();
        let loss = self.cross_entropy_into(&plan, hidden, 1.0, view, &mut rows, &mut buffers)?;
        Ok(CrossEntropy {
            loss,
            hidden: hidden_gradient,
            rows,
        })
    }

    fn cross_entropy_into(
        &self,
        plan: &CrossEntropyPlan,
        hidden: ArrayView2<'_, O>,
        upstream: f64,
        hidden_gradient: ArrayViewMut2<'_, O>,
        gradients: &mut NdGradient,
        buffers: &mut LossBuffers<O>,
    ) -> Result<f64, S::Error> {
        let active = self.active()?;
        let head = SharedHead {
            source: self.source(),
            delta: active.as_deref().map(NdRows::host),
            tokens: self.tokens(),
        };
        let backward = Backward {
            upstream,
            hidden: hidden_gradient,
            rows: gradients,
        };
        Ok(head.loss(&hidden, plan, buffers, Some(backward))?)
    }

    fn zero_gradient(&self) -> NdGradient {
        let mut gradients = NdGradient::default();
        let adapters = self.active_names().filter_map(|name| self.adapter(name).ok());
        let training = adapters.filter(|adapter| self.is_enabled() && !adapter.is_merged());
        for adapter in training.filter(|adapter| !adapter.tokens().is_empty()) {
            // Zeros of its own cannot fail to fit.
            let _ = gradients.add(adapter.delta().host(), O::Compute::DTYPE, |_| Ok(()));
        }
        gradients
    }
}

/// How the rows of a planned batch come about.
pub(crate) fn gather<'a, S: HostTable>(
    source: &'a S,
    delta: Option<&'a TokenRows>,
    plan: &'a LookupPlan,
    transform: RowTransform,
) -> Gather<'a, impl Fn(TokenId) -> Option<RowRef<'a>> + Sync, impl Fn(Slot) -> Option<RowRef<'a>> + Sync> {
    Gather {
        plan,
        embedding_dim: source.embedding_dim(),
        dtype: source.dtype(),
        transform,
        frozen: |id| source.row(id),
        trained: delta.map(|delta| |slot: Slot| delta.row(slot.0)),
    }
}

//! The layer for ndarray: core's, with forward passes into a caller's buffer and explicit backward passes.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use trainable_tokens_core::{
    DeltaStore, Element, Error, HostTable, LookupPlan, Result, RowRef, RowTransform, Slot, TokenId, TokenRows,
};

use crate::{NdGradient, NdRows, Ndarray, head};

/// A frozen table of which some rows train: core's layer over [`Ndarray`].
pub type TrainableTokens<S, O = f32> = trainable_tokens_core::TrainableTokens<Ndarray<S, O>>;

/// What an explicit framework needs besides core's layer: output buffers and backward passes.
pub trait TrainableTokensExt<O: Element> {
    /// The table's error.
    type Error;

    /// The rows of a planned batch, written to `out` of shape `[N, D]`. Allocates nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `out` has another shape, [`Error::ForeignPlan`] if the plan belongs to another token set;
    /// `out` is unchanged.
    fn lookup_into(&self, plan: &LookupPlan, out: ArrayViewMut2<'_, O>) -> Result<(), Self::Error>;

    /// The gradient of the trained rows, `[k, D]`, from that of a lookup's output, `[N, D]`. The work follows the
    /// positions that hold a trainable token.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `upstream` has another shape, [`Error::NoGradient`] while the layer is merged.
    fn backward(&self, plan: &LookupPlan, upstream: ArrayView2<'_, O>) -> Result<NdGradient, Self::Error>;

    /// As [`backward`](Self::backward), added into `gradient`, which must be in the type that `O` computes in.
    /// Allocates nothing if `upstream` is row-major.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`](trainable_tokens_core::Error::DType) if something does not fit,
    /// [`Error::NoGradient`] while the layer is merged.
    fn backward_into(
        &self,
        plan: &LookupPlan,
        upstream: ArrayView2<'_, O>,
        gradient: &mut NdGradient,
    ) -> Result<(), Self::Error>;

    /// The gradients of a tied head: that of `hidden`, returned as `[N, D]`, and that of the trained rows, added
    /// into `gradient` (in the type that `O` computes in), from that of the logits, `[N, V]`. While the layer is
    /// merged the rows have none, and `gradient` stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] or [`Error::DType`](trainable_tokens_core::Error::DType) if something does not fit.
    fn logits_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        gradient: &mut NdGradient,
    ) -> Result<Array2<O>, Self::Error>;

    /// A zero gradient for the passes above.
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
        plan.expect_tokens(self.tokens())?;
        let (delta, transform) = (self.active().map(NdRows::rows), self.transform());
        let mut rows = RowCursor::new(source, delta, plan);
        if let Some(values) = out.as_slice_mut() {
            for out in values.chunks_exact_mut(dim.max(1)) {
                rows.next(|row, trained| write(row, trained, transform, source, out))?;
            }
        } else {
            let mut buffer = vec![O::default(); dim];
            for mut out in out.outer_iter_mut() {
                rows.next(|row, trained| write(row, trained, transform, source, &mut buffer))?;
                out.iter_mut().zip(&buffer).for_each(|(out, value)| *out = *value);
            }
        }
        Ok(())
    }

    fn backward(&self, plan: &LookupPlan, upstream: ArrayView2<'_, O>) -> Result<NdGradient, S::Error> {
        let mut gradient = self.zero_gradient();
        self.backward_into(plan, upstream, &mut gradient)?;
        Ok(gradient)
    }

    fn backward_into(
        &self,
        plan: &LookupPlan,
        upstream: ArrayView2<'_, O>,
        gradient: &mut NdGradient,
    ) -> Result<(), S::Error> {
        plan.expect_tokens(self.tokens())?;
        if self.is_merged() && !self.tokens().is_empty() {
            return Err(Error::NoGradient.into());
        }
        let dim = self.source().embedding_dim();
        gradient.expect_shape("gradient of the trained rows", self.tokens().len(), dim)?;
        let expected = [plan.len(), dim];
        if upstream.shape() != expected {
            return Err(Error::shape("gradient of the lookup", &expected, upstream.shape()).into());
        }
        let upstream = upstream.as_standard_layout();
        plan.accumulate(
            upstream.as_slice().unwrap_or_default(),
            self.transform().scale,
            gradient,
        )?;
        Ok(())
    }

    fn logits_backward(
        &self,
        hidden: ArrayView2<'_, O>,
        upstream: ArrayView2<'_, O>,
        gradient: &mut NdGradient,
    ) -> Result<Array2<O>, S::Error> {
        let delta = self.active().map(NdRows::rows);
        Ok(head::logits_backward(
            &hidden,
            &upstream,
            self.source(),
            delta,
            self.tokens(),
            gradient,
        )?)
    }

    fn zero_gradient(&self) -> NdGradient {
        TokenRows::zeros(
            O::Compute::DTYPE,
            self.delta().num_rows(),
            self.delta().embedding_dim(),
        )
    }
}

/// Appends the rows of a planned batch to `out`, which has room for them.
pub(crate) fn copy_rows<S: HostTable, O: Element>(
    source: &S,
    delta: Option<&TokenRows>,
    plan: &LookupPlan,
    transform: RowTransform,
    out: &mut Vec<O>,
) -> Result<()> {
    let dim = source.embedding_dim();
    let mut rows = RowCursor::new(source, delta, plan);
    for _ in 0..plan.len() {
        rows.next(|row, trained| {
            if !transform.is_identity() || trained && row.dtype() != source.dtype() {
                let start = out.len();
                out.resize(start + dim, O::default());
                write(row, trained, transform, source, &mut out[start..]);
            } else {
                row.extend_into(out);
            }
        })?;
    }
    Ok(())
}

/// Writes one row: a trained one as the table would hold it, a frozen one as it is; then transformed.
fn write<S: HostTable, O: Element>(
    row: RowRef<'_>,
    trained: bool,
    transform: RowTransform,
    source: &S,
    out: &mut [O],
) {
    if trained {
        row.decode_rounded(source.dtype(), out);
    } else {
        row.decode_into(out);
    }
    transform.apply(out);
}

/// Walks a plan: at each position the frozen row, or the trained one that replaces it.
struct RowCursor<'a, S> {
    source: &'a S,
    delta: Option<&'a TokenRows>,
    plan: &'a LookupPlan,
    position: usize,
    hit: usize,
}

impl<'a, S: HostTable> RowCursor<'a, S> {
    fn new(source: &'a S, delta: Option<&'a TokenRows>, plan: &'a LookupPlan) -> Self {
        Self {
            source,
            delta,
            plan,
            position: 0,
            hit: 0,
        }
    }

    /// Hands the next row over, and whether it is a trained one.
    #[inline]
    fn next(&mut self, take: impl FnOnce(RowRef<'_>, bool)) -> Result<()> {
        let id = self.plan.input_ids()[self.position];
        let missing = || Error::TokenOutOfRange {
            id: i64::from(id),
            vocab_size: self.source.vocab_size(),
        };
        let trained = match self.delta {
            Some(delta)
                if self
                    .plan
                    .positions()
                    .get(self.hit)
                    .is_some_and(|p| *p as usize == self.position) =>
            {
                let Slot(slot) = Slot(self.plan.slots()[self.hit] as usize);
                self.hit += 1;
                Some(delta.row(slot).ok_or_else(missing)?)
            }
            _ => None,
        };
        match trained {
            Some(row) => take(row, true),
            None => take(self.source.row(TokenId(id)).ok_or_else(missing)?, false),
        }
        self.position += 1;
        Ok(())
    }
}

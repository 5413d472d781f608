//! The marker type that implements core's backend.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Shape, Tensor};
use trainable_tokens_core::{
    Backend, CrossEntropyPlan, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowMix,
    RowTransform, TokenRows, TokenSet,
};

use crate::convert::to_rows;
use crate::ops::{Overrides, Passes, linear_cross_entropy, lookup_rows, project, stack_rows};
use crate::{CandleDelta, CandleTable, Error, Result};

/// Candle, as core sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candle;

impl Backend for Candle {
    type Error = Error;
    type Source = CandleTable;
    type Delta = CandleDelta;
    type Tensor = Tensor;
    type Gradients = GradStore;

    fn delta(source: &CandleTable, rows: &TokenRows) -> Result<CandleDelta> {
        CandleDelta::new(rows, source.tensor().device())
    }

    fn lookup(
        source: &CandleTable,
        delta: Option<&CandleDelta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Tensor> {
        let shape = Shape::from((plan.len(), source.embedding_dim()));
        lookup_rows(source, delta, &Arc::new(plan.clone()), transform, shape)
    }

    fn logits(
        hidden: Tensor,
        source: &CandleTable,
        delta: Option<&CandleDelta>,
        tokens: &TokenSet,
    ) -> Result<Tensor> {
        logits(&hidden, source, delta.map(|delta| (delta, tokens)), None)
    }

    fn linear_cross_entropy(
        hidden: Tensor,
        source: &CandleTable,
        delta: Option<&CandleDelta>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Tensor> {
        let trained = delta.map(|delta| (delta, tokens));
        let loss = cross_entropy(&hidden, source, trained, None, plan, Passes::Both)?;
        Ok(loss.reshape((1, 1))?)
    }

    fn combine(deltas: &[&CandleDelta], mix: &RowMix) -> Result<CandleDelta> {
        CandleDelta::combine(deltas, mix)
    }

    fn num_rows(tensor: &Tensor) -> usize {
        tensor.dims().first().copied().unwrap_or(0)
    }

    fn split_rows(tensor: Tensor, parts: &[Range<usize>]) -> Result<Vec<Tensor>> {
        let part = |part: &Range<usize>| Ok(tensor.narrow(0, part.start, part.len())?);
        parts.iter().map(part).collect()
    }

    fn join_rows(parts: Vec<Tensor>) -> Result<Tensor> {
        let nothing = || CoreError::shape("values to join", &[1], &[0]).into();
        stack_rows(&parts)?.ok_or_else(nothing)
    }

    fn gradient(gradients: &GradStore, delta: &CandleDelta) -> Result<Option<TokenRows>> {
        let Ok(leaf) = delta.var() else {
            return Ok(None);
        };
        gradients.get(leaf.as_tensor()).map(to_rows).transpose()
    }
}

/// The logits `[.., V]` of `hidden` `[.., D]` over a table overridden by the trained rows of some tokens, with a detached
/// bias `[V]`.
///
/// # Errors
///
/// When the shapes, element types or devices do not fit, and when candle fails.
pub(crate) fn logits(
    hidden: &Tensor,
    source: &CandleTable,
    trained: Option<(&CandleDelta, &TokenSet)>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let overrides = overrides(source, trained)?;
    project(hidden, source.tensor(), bias, overrides)
}

/// The cross-entropy `[]` of [`logits`], as many of them at a time as the plan says.
///
/// # Errors
///
/// As for [`logits`]; when there is not one label for each row.
pub(crate) fn cross_entropy(
    hidden: &Tensor,
    source: &CandleTable,
    trained: Option<(&CandleDelta, &TokenSet)>,
    bias: Option<&Tensor>,
    plan: &CrossEntropyPlan,
    passes: Passes,
) -> Result<Tensor> {
    let (weight, overrides) = (source.tensor(), overrides(source, trained)?);
    linear_cross_entropy(hidden, weight, bias, overrides.as_ref(), plan, passes)
}

/// The trained rows of at least one token, in the place of the table's.
fn overrides(source: &CandleTable, trained: Option<(&CandleDelta, &TokenSet)>) -> Result<Option<Overrides>> {
    let Some((delta, tokens)) = trained.filter(|(_, tokens)| !tokens.is_empty()) else {
        return Ok(None);
    };
    let what = "token set of the head";
    let expected = [delta.num_rows(), source.vocab_size()];
    let got = [tokens.len(), tokens.vocab_size()];
    if expected != got {
        return Err(CoreError::shape(what, &expected, &got).into());
    }
    let table = source.tensor();
    let columns = Tensor::from_vec(tokens.to_vec(), tokens.len(), table.device())?;
    Overrides::new(table, delta.tensor(), columns).map(Some)
}

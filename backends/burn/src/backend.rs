//! The marker type that implements core's backend.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};
use trainable_tokens_core::{
    Backend, CrossEntropyPlan, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowMix,
    RowTransform, TokenRows, TokenSet,
};

use crate::convert::to_rows;
use crate::ops::{Overrides, join_rows, linear_cross_entropy, lookup_rows, project, split_rows};
use crate::{BurnDelta, BurnTable, Error, Result};

/// Burn, as core sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Burn;

impl Backend for Burn {
    type Error = Error;
    type Source = BurnTable;
    type Delta = BurnDelta;
    type Tensor = Tensor<2>;
    type Gradients = Gradients;

    fn delta(source: &BurnTable, rows: &TokenRows) -> Result<BurnDelta> {
        BurnDelta::new(rows, &source.tensor().device())
    }

    fn lookup(
        source: &BurnTable,
        delta: Option<&BurnDelta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Tensor<2>> {
        let delta = delta.map(BurnDelta::tensor);
        lookup_rows(source, delta.as_ref(), plan, transform)
    }

    fn logits(
        hidden: Tensor<2>,
        source: &BurnTable,
        delta: Option<&BurnDelta>,
        tokens: &TokenSet,
    ) -> Result<Tensor<2>> {
        let overrides = overrides(source, delta, tokens)?;
        project(hidden, source, overrides.as_ref())
    }

    fn linear_cross_entropy(
        hidden: Tensor<2>,
        source: &BurnTable,
        delta: Option<&BurnDelta>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Tensor<2>> {
        let loss = cross_entropy(&hidden, source, delta, tokens, None, plan)?;
        Ok(loss.reshape([1, 1]))
    }

    fn combine(deltas: &[&BurnDelta], mix: &RowMix) -> Result<BurnDelta> {
        BurnDelta::combine(deltas, mix)
    }

    fn num_rows(tensor: &Tensor<2>) -> usize {
        tensor.dims()[0]
    }

    fn split_rows(tensor: Tensor<2>, parts: &[Range<usize>]) -> Result<Vec<Tensor<2>>> {
        Ok(split_rows(&tensor, parts))
    }

    fn join_rows(parts: Vec<Tensor<2>>) -> Result<Tensor<2>> {
        join_rows(parts)
    }

    fn gradient(gradients: &Gradients, delta: &BurnDelta) -> Result<Option<TokenRows>> {
        let Ok(param) = delta.param() else {
            return Ok(None);
        };
        let gradient = param.val().grad(gradients);
        gradient
            .map(|gradient| to_rows("gradient of the trained rows", gradient))
            .transpose()
    }
}

/// The cross-entropy `[1]` of the head with a bias `[V]`, as many logits at a time as the plan says.
///
/// # Errors
///
/// When the shapes, element types or devices do not fit.
pub(crate) fn cross_entropy(
    hidden: &Tensor<2>,
    source: &BurnTable,
    delta: Option<&BurnDelta>,
    tokens: &TokenSet,
    bias: Option<&Tensor<1>>,
    plan: &CrossEntropyPlan,
) -> Result<Tensor<1>> {
    let overrides = overrides(source, delta, tokens)?;
    linear_cross_entropy(hidden, source, overrides.as_ref(), bias, plan)
}

/// The trained rows of at least one token, in the place of the table's.
fn overrides(source: &BurnTable, delta: Option<&BurnDelta>, tokens: &TokenSet) -> Result<Option<Overrides>> {
    let Some(delta) = delta.filter(|_| !tokens.is_empty()) else {
        return Ok(None);
    };
    let expected = [delta.num_rows(), source.vocab_size()];
    let got = [tokens.len(), tokens.vocab_size()];
    if expected != got {
        return Err(CoreError::shape("token set of the head", &expected, &got).into());
    }
    Ok(Some(Overrides::new(delta.tensor(), tokens)))
}

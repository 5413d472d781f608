//! The marker type that implements core's backend.

use burn::tensor::{Gradients, Tensor};
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowTransform, TokenRows, TokenSet,
};

use crate::convert::to_rows;
use crate::ops::{Overrides, lookup_rows, project};
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
        let delta = delta.map(|delta| delta.param().val());
        lookup_rows(source, delta.as_ref(), plan, transform)
    }

    fn logits(
        hidden: Tensor<2>,
        source: &BurnTable,
        delta: Option<&BurnDelta>,
        tokens: &TokenSet,
    ) -> Result<Tensor<2>> {
        let overrides = match delta {
            Some(delta) if !tokens.is_empty() => {
                let expected = [delta.num_rows(), source.vocab_size()];
                let got = [tokens.len(), tokens.vocab_size()];
                if expected != got {
                    return Err(CoreError::shape("token set of the head", &expected, &got).into());
                }
                Some(Overrides::new(delta.param().val(), tokens))
            }
            _ => None,
        };
        project(hidden, source, overrides.as_ref())
    }

    fn gradient(gradients: &Gradients, delta: &BurnDelta) -> Result<Option<TokenRows>> {
        let gradient = delta.param().val().grad(gradients);
        gradient
            .map(|gradient| to_rows("gradient of the trained rows", gradient))
            .transpose()
    }
}

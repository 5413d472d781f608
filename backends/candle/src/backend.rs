//! The marker type that implements core's backend.

use std::sync::Arc;

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowTransform, TokenRows, TokenSet,
};

use crate::convert::to_rows;
use crate::ops::{Overrides, lookup_rows, project};
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
        lookup_rows(source, delta, &Arc::new(plan.clone()), transform)
    }

    fn logits(
        hidden: Tensor,
        source: &CandleTable,
        delta: Option<&CandleDelta>,
        tokens: &TokenSet,
    ) -> Result<Tensor> {
        let overrides = match delta {
            None => None,
            Some(_) if tokens.is_empty() => None,
            Some(delta) => {
                let what = "token set of the head";
                let expected = [delta.num_rows(), source.vocab_size()];
                let got = [tokens.len(), tokens.vocab_size()];
                if expected != got {
                    return Err(CoreError::shape(what, &expected, &got).into());
                }
                let columns = Tensor::from_vec(tokens.to_vec(), tokens.len(), source.tensor().device())?;
                Some(Overrides::new(source.tensor(), delta.var(), columns)?)
            }
        };
        project(&hidden, source.tensor(), None, overrides)
    }

    fn gradient(gradients: &GradStore, delta: &CandleDelta) -> Result<Option<TokenRows>> {
        gradients.get(delta.var().as_tensor()).map(to_rows).transpose()
    }
}

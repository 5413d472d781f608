//! The marker type that implements core's backend.

use std::marker::PhantomData;

use dfdx::tensor::{Cpu, Gradients, OwnedTape, Tensor};
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowTransform, TokenRows, TokenSet,
};

use crate::ops::{Head, Lookup, project};
use crate::{DfdxDelta, DfdxDevice, DfdxElement, DfdxTable, Error, Result};

/// dfdx, as core sees it: tables of element type `E` on device `D`.
///
/// Values are matrices with a tape, so that one graph runs through lookup, model and head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dfdx<E, D = Cpu>(PhantomData<fn() -> (E, D)>);

impl<E: DfdxElement, D: DfdxDevice<E>> Backend for Dfdx<E, D> {
    type Error = Error;
    type Source = DfdxTable<E, D>;
    type Delta = DfdxDelta<E, D>;
    type Tensor = Tensor<(usize, usize), E, D, OwnedTape<E, D>>;
    type Gradients = Gradients<E, D>;

    fn delta(source: &Self::Source, rows: &TokenRows) -> Result<Self::Delta> {
        DfdxDelta::new(rows, source.tensor().device())
    }

    fn lookup(
        source: &Self::Source,
        delta: Option<&Self::Delta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Self::Tensor> {
        let lookup = Lookup {
            base: source.tensor(),
            leaf: delta.map(DfdxDelta::as_leaf),
            plan,
            transform,
        };
        lookup.forward(OwnedTape::default())
    }

    fn logits(
        hidden: Self::Tensor,
        source: &Self::Source,
        delta: Option<&Self::Delta>,
        tokens: &TokenSet,
    ) -> Result<Self::Tensor> {
        let head = head(source, delta, tokens)?;
        project(hidden, &head)
    }

    fn gradient(gradients: &Self::Gradients, delta: &Self::Delta) -> Result<Option<TokenRows>> {
        delta.gradient(gradients)
    }
}

/// The head of a table and its trained rows, without a bias.
pub(crate) fn head<'a, E: DfdxElement, D: DfdxDevice<E>>(
    source: &'a DfdxTable<E, D>,
    delta: Option<&'a DfdxDelta<E, D>>,
    tokens: &'a TokenSet,
) -> Result<Head<'a, E, D>> {
    if let Some(delta) = delta {
        let expected = [delta.num_rows(), source.vocab_size()];
        let got = [tokens.len(), tokens.vocab_size()];
        if expected != got {
            return Err(CoreError::shape("token set of the head", &expected, &got).into());
        }
    }
    let delta = delta.filter(|_| !tokens.is_empty());
    Ok(Head {
        base: source.tensor(),
        overrides: delta.map(|delta| (delta.as_leaf(), tokens.ids())),
        bias: None,
    })
}

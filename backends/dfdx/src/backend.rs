//! The marker type that implements core's backend.

use std::marker::PhantomData;
use std::ops::Range;

use dfdx::tensor::{Cpu, Gradients, OwnedTape, Tensor};
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, LookupPlan, RowMix, RowTransform, TokenRows,
    TokenSet,
};

use crate::convert::dims;
use crate::ops::{Head, Lookup, join_rows, project, split_rows};
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
            rows: delta.map(DfdxDelta::new_rows),
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

    fn combine(deltas: &[&Self::Delta], mix: &RowMix) -> Result<Self::Delta> {
        DfdxDelta::combine(deltas, mix)
    }

    fn num_rows(tensor: &Self::Tensor) -> usize {
        dims(tensor)[0]
    }

    /// The first part goes on with the value's tape: gradients reach what is behind it if that part is used, too.
    fn split_rows(tensor: Self::Tensor, parts: &[Range<usize>]) -> Result<Vec<Self::Tensor>> {
        split_rows(tensor, parts)
    }

    fn join_rows(parts: Vec<Self::Tensor>) -> Result<Self::Tensor> {
        join_rows(parts)
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
        overrides: delta.map(|delta| (delta.new_rows(), tokens.ids())),
        bias: None,
    })
}

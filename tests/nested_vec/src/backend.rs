//! The backend's operations.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

use trainable_tokens_core::{
    Backend, CrossEntropyPlan, Element, EmbeddingSource, HostRows, LookupPlan, RowMix, RowTransform, Slot,
    TokenId, TokenRows, TokenSet,
};

use crate::{Error, Gradients, Matrix, VecRows, VecTable};

/// Nested vectors as a backend: tables and values of element type `T`.
#[derive(Debug)]
pub struct NestedVec<T>(PhantomData<T>);

impl<T: Element> Backend for NestedVec<T> {
    type Error = Error;
    type Source = VecTable<T>;
    type Delta = VecRows;
    type Tensor = Matrix<T>;
    type Gradients = Gradients;

    fn delta(_: &VecTable<T>, rows: &TokenRows) -> Result<VecRows, Error> {
        Ok(VecRows::new(rows.clone()))
    }

    fn lookup(
        source: &VecTable<T>,
        delta: Option<&VecRows>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<T>, Error> {
        let ids = plan.token_ids();
        let mut rows: Vec<Vec<T>> = ids.map(|id| source.0.rows[id.row()].clone()).collect();
        if let Some(delta) = delta {
            let trained = Matrix::from_token_rows(delta.rows());
            for (position, slot) in plan.positions().iter().zip(plan.slots()) {
                rows[*position as usize].clone_from(&trained.rows[*slot as usize]);
            }
        }
        rows.iter_mut().for_each(|row| transform.apply(row));
        Matrix::new(rows, source.embedding_dim())
    }

    fn logits(
        hidden: Matrix<T>,
        source: &VecTable<T>,
        delta: Option<&VecRows>,
        tokens: &TokenSet,
    ) -> Result<Matrix<T>, Error> {
        hidden.expect_shape("hidden states", hidden.rows.len(), source.embedding_dim())?;
        let mut logits = vec![vec![T::default(); source.vocab_size()]; hidden.rows.len()];
        for (id, weight) in overridden(source, delta, tokens) {
            for (hidden, logits) in hidden.rows.iter().zip(&mut logits) {
                logits[id.row()] = T::from_compute(dot(hidden, &weight));
            }
        }
        Matrix::new(logits, source.vocab_size())
    }

    fn linear_cross_entropy(
        hidden: Matrix<T>,
        source: &VecTable<T>,
        delta: Option<&VecRows>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Matrix<T>, Error> {
        plan.expect_hidden([hidden.num_rows(), hidden.columns], source.embedding_dim())?;
        let mut loss = 0.0;
        for chunk in plan.chunks(size_of::<T::Compute>()) {
            let positions = &plan.positions()[chunk.clone()];
            let mut logits = logits_at(positions, &hidden, source, delta, tokens);
            loss += plan.loss(chunk, &mut logits, 1)?;
        }
        Matrix::new(vec![vec![T::from_f64(loss)]], 1)
    }

    fn combine(deltas: &[&VecRows], mix: &RowMix) -> Result<VecRows, Error> {
        let parts: Vec<_> = deltas.iter().map(|delta| &delta.0).collect();
        Ok(VecRows(HostRows::combine(&parts, mix)?))
    }

    fn num_rows(tensor: &Matrix<T>) -> usize {
        tensor.num_rows()
    }

    fn split_rows(tensor: Matrix<T>, parts: &[Range<usize>]) -> Result<Vec<Matrix<T>>, Error> {
        let columns = tensor.columns;
        let part = |part: &Range<usize>| Matrix::new(tensor.rows[part.clone()].to_vec(), columns);
        parts.iter().map(part).collect()
    }

    fn join_rows(parts: Vec<Matrix<T>>) -> Result<Matrix<T>, Error> {
        let columns = parts[0].columns;
        Matrix::new(parts.into_iter().flat_map(|part| part.rows).collect(), columns)
    }

    fn gradient(gradients: &Gradients, delta: &VecRows) -> Result<Option<TokenRows>, Error> {
        Ok(gradients.0.get(&delta.0).cloned())
    }
}

/// The sum of products, in the compute type.
fn dot<T: Element>(x: &[T], w: &[T]) -> T::Compute {
    let products = x.iter().zip(w).map(|(x, w)| x.to_compute() * w.to_compute());
    products.fold(T::Compute::default(), |sum, x| sum + x)
}

/// The logits `[positions.len(), V]` of some rows of `hidden`, row-major, in the compute type.
pub(crate) fn logits_at<T: Element>(
    positions: &[u32],
    hidden: &Matrix<T>,
    source: &VecTable<T>,
    delta: Option<&VecRows>,
    tokens: &TokenSet,
) -> Vec<T::Compute> {
    let v = source.vocab_size();
    let mut logits = vec![T::Compute::default(); positions.len() * v];
    for (id, weight) in overridden(source, delta, tokens) {
        for (position, logits) in positions.iter().zip(logits.chunks_exact_mut(v)) {
            logits[id.row()] = dot(&hidden.rows[*position as usize], &weight);
        }
    }
    logits
}

/// The rows of the table, those of trainable tokens replaced; no more than one row is copied at a time.
pub(crate) fn overridden<'a, T: Element>(
    source: &'a VecTable<T>,
    delta: Option<&VecRows>,
    tokens: &TokenSet,
) -> impl Iterator<Item = (TokenId, Cow<'a, [T]>)> {
    let trained = move |id| {
        let Slot(slot) = tokens.slot(id)?;
        let mut row = vec![T::default(); source.embedding_dim()];
        delta?.rows().row(slot)?.decode_into(&mut row);
        Some(row)
    };
    let rows = (0..).map(TokenId).zip(&source.0.rows);
    rows.map(move |(id, frozen)| (id, trained(id).map_or(Cow::Borrowed(&frozen[..]), Cow::Owned)))
}

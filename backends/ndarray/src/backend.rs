//! The backend's four operations.

use std::marker::PhantomData;

use ndarray::Array2;
use trainable_tokens_core::{
    Backend, Element, Error, HostTable, LookupPlan, RowTransform, TokenRows, TokenSet,
};

use crate::layer::copy_rows;
use crate::{NdGradient, NdRows, head};

/// ndarray as a backend: tables `S` in host memory, values of element type `O`.
#[derive(Debug)]
pub struct Ndarray<S, O>(PhantomData<fn() -> (S, O)>);

impl<S: HostTable, O: Element> Backend for Ndarray<S, O> {
    type Error = S::Error;
    type Source = S;
    type Delta = NdRows<S::Error>;
    type Tensor = Array2<O>;
    type Gradients = NdGradient;

    fn delta(_: &S, rows: &TokenRows) -> Result<Self::Delta, S::Error> {
        Ok(NdRows::new(rows.clone()))
    }

    fn lookup(
        source: &S,
        delta: Option<&Self::Delta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Array2<O>, S::Error> {
        let dim = source.embedding_dim();
        let mut out = Vec::with_capacity(plan.len() * dim);
        copy_rows(source, delta.map(NdRows::rows), plan, transform, &mut out)?;
        let got = vec![out.len()];
        let expected = vec![plan.len(), dim];
        Ok(
            Array2::from_shape_vec((plan.len(), dim), out).map_err(|_| Error::Shape {
                what: "looked-up rows",
                expected,
                got,
            })?,
        )
    }

    fn logits(
        hidden: Array2<O>,
        source: &S,
        delta: Option<&Self::Delta>,
        tokens: &TokenSet,
    ) -> Result<Array2<O>, S::Error> {
        Ok(head::logits(hidden, source, delta.map(NdRows::rows), tokens)?)
    }

    fn gradient(gradient: &NdGradient, _: &Self::Delta) -> Result<Option<TokenRows>, S::Error> {
        Ok(Some(gradient.clone()))
    }
}

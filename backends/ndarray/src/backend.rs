//! The backend's operations.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use trainable_tokens_core::{
    Backend, CrossEntropyPlan, Element, Error, HostRows, HostTable, LookupPlan, RowMix, RowTransform,
    TokenRows, TokenSet,
};

use crate::layer::gather;
use crate::loss::SharedHead;
use crate::{LossBuffers, NdGradient, NdRows, head};

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
        Ok(NdRows::new(HostRows::new(rows.clone())))
    }

    fn lookup(
        source: &S,
        delta: Option<&Self::Delta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Array2<O>, S::Error> {
        let dim = source.embedding_dim();
        let out = gather(source, delta.map(NdRows::rows), plan, transform).to_vec()?;
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

    /// Without a graph it is the loss alone; [`TrainableTokensExt`](crate::TrainableTokensExt) has the gradients too.
    fn linear_cross_entropy(
        hidden: Array2<O>,
        source: &S,
        delta: Option<&Self::Delta>,
        tokens: &TokenSet,
        plan: &CrossEntropyPlan,
    ) -> Result<Array2<O>, S::Error> {
        let delta = delta.map(NdRows::host);
        let head = SharedHead {
            source,
            delta,
            tokens,
        };
        let loss = head.loss(&hidden.view(), plan, &mut LossBuffers::default(), None)?;
        Ok(Array2::from_elem((1, 1), O::from_f64(loss)))
    }

    fn combine(deltas: &[&Self::Delta], mix: &RowMix) -> Result<Self::Delta, S::Error> {
        let parts: Vec<_> = deltas.iter().map(|delta| delta.host()).collect();
        Ok(NdRows::new(HostRows::combine(&parts, mix)?))
    }

    fn num_rows(tensor: &Array2<O>) -> usize {
        tensor.nrows()
    }

    fn split_rows(tensor: Array2<O>, parts: &[Range<usize>]) -> Result<Vec<Array2<O>>, S::Error> {
        if let [_] = parts {
            return Ok(vec![tensor]);
        }
        let part = |part: &Range<usize>| tensor.slice(s![part.clone(), ..]).to_owned();
        Ok(parts.iter().map(part).collect())
    }

    fn join_rows(mut parts: Vec<Array2<O>>) -> Result<Array2<O>, S::Error> {
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let views: Vec<_> = parts.iter().map(ArrayView2::from).collect();
        let unequal = |_| Error::shape("rows to join", &[], &[]);
        Ok(concatenate(Axis(0), &views).map_err(unequal)?)
    }

    fn gradient(gradients: &NdGradient, delta: &Self::Delta) -> Result<Option<TokenRows>, S::Error> {
        Ok(gradients.get(delta.host()).cloned())
    }

    fn lend_gradient<'a>(
        gradients: &'a NdGradient,
        delta: &Self::Delta,
    ) -> Result<Option<Cow<'a, TokenRows>>, S::Error> {
        Ok(gradients.get(delta.host()).map(Cow::Borrowed))
    }
}

//! The backend, as the conformance kit drives it.

use std::marker::PhantomData;

use trainable_tokens_core::{DType, Element, TokenRows};
use trainable_tokens_nested_vec::{Error, Gradients, Matrix, NestedVec, VecTable};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Tables of the element type `T`.
pub(crate) struct Nested<T>(PhantomData<T>);

impl<T: Element> Harness for Nested<T> {
    type Backend = NestedVec<T>;
    const DTYPE: DType = T::DTYPE;

    fn source(rows: &TokenRows) -> Result<VecTable<T>, Error> {
        Ok(VecTable::new(Matrix::from_token_rows(rows)))
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Matrix<T>, Error> {
        Ok(Matrix::from_token_rows(values))
    }

    fn read(values: &Matrix<T>) -> Result<TokenRows, Error> {
        values.to_token_rows()
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error> {
        let mut gradients = Gradients::default();
        for (plan, upstream) in &pass.lookups {
            let upstream = Matrix::<T>::from_token_rows(upstream);
            gradients.add_lookup(layer.active(), plan, &upstream, layer.transform().scale)?;
        }
        let heads = pass.heads.iter().map(|(hidden, upstream)| {
            let [hidden, upstream] = [hidden, upstream].map(Matrix::from_token_rows);
            let (source, delta, tokens) = (layer.source(), layer.active(), layer.tokens());
            let hidden = gradients.add_head(source, delta, tokens, &hidden, &upstream)?;
            hidden.to_token_rows()
        });
        let hidden = heads.collect::<Result<_, Error>>()?;
        Ok(PassGradients { gradients, hidden })
    }
}

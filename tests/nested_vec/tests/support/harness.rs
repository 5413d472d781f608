//! The backend, as the conformance kit drives it.

use std::marker::PhantomData;

use trainable_tokens_core::{CrossEntropyPlan, DType, Element, EmbeddingSource, TokenRows};
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
            let rows = layer.rows_for(plan)?;
            gradients.add_lookup(rows.as_deref(), plan, &upstream, layer.transform().scale)?;
        }
        let heads = pass.heads.iter().map(|head| {
            let [hidden, upstream] = [&head.hidden, &head.upstream].map(Matrix::from_token_rows);
            let source = layer.source();
            let hidden = match head.adapters() {
                None => {
                    let rows = layer.active()?;
                    gradients.add_head(source, rows.as_deref(), layer.tokens(), &hidden, &upstream)?
                }
                Some(adapters) => {
                    let parts = layer.mixed_parts(hidden.num_rows(), &adapters)?;
                    gradients.add_mixed_head(source, &parts, &hidden, &upstream)?
                }
            };
            hidden.to_token_rows()
        });
        let mut hidden = heads.collect::<Result<Vec<_>, Error>>()?;
        for loss in &pass.losses {
            let source = layer.source();
            let plan = CrossEntropyPlan::new(&loss.labels, source.vocab_size(), loss.options)?;
            let (states, rows) = (Matrix::from_token_rows(&loss.hidden), layer.active()?);
            let (delta, tokens) = (rows.as_deref(), layer.tokens());
            let gradient = gradients.add_loss(source, delta, tokens, &states, &plan, loss.upstream)?;
            hidden.push(gradient.to_token_rows()?);
        }
        Ok(PassGradients { gradients, hidden })
    }
}

//! The backend, as the conformance kit drives it.

use std::marker::PhantomData;

use ndarray::{Array2, OwnedRepr};
use trainable_tokens_core::{CrossEntropyPlan, DType, Element, EmbeddingSource, TokenRows};
use trainable_tokens_ndarray::{Error, LossBuffers, NdTable, Ndarray, TrainableTokensExt};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Tables in memory, and values of their type.
pub(crate) struct Nd<T>(PhantomData<T>);

pub(crate) fn array<T: Element>(rows: &TokenRows) -> Array2<T> {
    Array2::from_shape_vec(rows.shape(), rows.as_slice::<T>().unwrap().to_vec()).unwrap()
}

impl<T: Element> Harness for Nd<T> {
    type Backend = Ndarray<NdTable<OwnedRepr<T>>, T>;
    const DTYPE: DType = T::DTYPE;

    fn source(rows: &TokenRows) -> Result<NdTable<OwnedRepr<T>>, Error> {
        NdTable::new(array(rows))
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Array2<T>, Error> {
        Ok(array(values))
    }

    fn read(values: &Array2<T>) -> Result<TokenRows, Error> {
        let (rows, columns) = values.dim();
        Ok(TokenRows::new(values.iter().copied().collect(), rows, columns)?)
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error> {
        let mut gradients = layer.zero_gradient();
        for (plan, upstream) in &pass.lookups {
            layer.backward_into(plan, array(upstream).view(), &mut gradients)?;
        }
        let heads = pass.heads.iter().map(|head| {
            let (hidden, upstream) = (array(&head.hidden), array(&head.upstream));
            let (hidden, upstream) = (hidden.view(), upstream.view());
            Self::read(&match head.adapters() {
                None => layer.logits_backward(hidden, upstream, &mut gradients)?,
                Some(adapters) => layer.logits_mixed_backward(hidden, upstream, &adapters, &mut gradients)?,
            })
        });
        let mut hidden = heads.collect::<Result<Vec<_>, Error>>()?;
        let mut buffers = LossBuffers::default();
        for loss in &pass.losses {
            let plan = CrossEntropyPlan::new(&loss.labels, layer.source().vocab_size(), loss.options)?;
            let states = array(&loss.hidden);
            let (mut out, states) = (states.clone(), states.view());
            let to = out.view_mut();
            layer.cross_entropy_into(&plan, states, loss.upstream, to, &mut gradients, &mut buffers)?;
            hidden.push(Self::read(&out)?);
        }
        Ok(PassGradients { gradients, hidden })
    }
}

//! The backend on the CPU, as the conformance kit drives it.

use std::marker::PhantomData;

use candle_core::{Device, Tensor, Var, WithDType};
use trainable_tokens_candle::{Candle, CandleTable, Error};
use trainable_tokens_core::{DType, Element, TokenRows};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Tables of the element type `T`.
pub(crate) struct OnCpu<T>(PhantomData<T>);

pub(crate) fn tensor<T: Element + WithDType>(rows: &TokenRows) -> Result<Tensor, Error> {
    let [n, d] = rows.shape();
    Ok(Tensor::from_slice(
        rows.as_slice::<T>().unwrap(),
        (n, d),
        &Device::Cpu,
    )?)
}

impl<T: Element + WithDType> Harness for OnCpu<T> {
    type Backend = Candle;
    const DTYPE: DType = <T as Element>::DTYPE;

    fn source(rows: &TokenRows) -> Result<CandleTable, Error> {
        CandleTable::new(tensor::<T>(rows)?)
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Tensor, Error> {
        tensor::<T>(values)
    }

    fn read(values: &Tensor) -> Result<TokenRows, Error> {
        let (n, d) = values.dims2()?;
        if values.dtype() != <T as WithDType>::DTYPE {
            // The loss of a table of half precision.
            return Ok(TokenRows::new(values.flatten_all()?.to_vec1::<f32>()?, n, d)?);
        }
        let values = if n == 0 {
            Vec::new()
        } else {
            values.flatten_all()?.to_vec1::<T>()?
        };
        Ok(TokenRows::new(values, n, d)?)
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error> {
        let mut loss = Tensor::zeros((), <T as WithDType>::DTYPE, &Device::Cpu)?;
        for (plan, upstream) in &pass.lookups {
            let out = layer.lookup_planned(plan)?;
            loss = (loss + (out * tensor::<T>(upstream)?)?.sum_all()?)?;
        }
        let mut leaves = Vec::new();
        for head in &pass.heads {
            let leaf = Var::from_tensor(&tensor::<T>(&head.hidden)?)?;
            let hidden = leaf.as_tensor().clone();
            let out = match head.adapters() {
                None => layer.logits(hidden)?,
                Some(adapters) => layer.logits_mixed(hidden, &adapters)?,
            };
            loss = (loss + (out * tensor::<T>(&head.upstream)?)?.sum_all()?)?;
            leaves.push(leaf);
        }
        for pass in &pass.losses {
            let leaf = Var::from_tensor(&tensor::<T>(&pass.hidden)?)?;
            let hidden = leaf.as_tensor().clone();
            let out = layer.linear_cross_entropy(hidden, &pass.labels, pass.options)?;
            let out = (out.sum_all()? * pass.upstream)?;
            loss = (loss + out.to_dtype(<T as WithDType>::DTYPE)?)?;
            leaves.push(leaf);
        }
        let gradients = loss.backward()?;
        let hidden = leaves.iter().map(|leaf| Self::read(gradients.get(leaf).unwrap()));
        let hidden = hidden.collect::<Result<_, Error>>()?;
        Ok(PassGradients { gradients, hidden })
    }
}

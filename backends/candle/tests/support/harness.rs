//! The backend on a device, as the conformance kit drives it.

#![allow(dead_code)]

use std::marker::PhantomData;

use candle_core::{Device, Tensor, Var, WithDType};
use trainable_tokens_candle::{Candle, CandleTable, Error};
use trainable_tokens_core::{DType, Element, TokenRows};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Where the tensors of a test lie.
pub(crate) trait Place: 'static {
    fn device() -> Device;
}

/// Tables of the element type `T` on a device.
pub(crate) struct On<P, T>(PhantomData<(P, T)>);

pub(crate) struct Cpu;

pub(crate) type OnCpu<T> = On<Cpu, T>;

impl Place for Cpu {
    fn device() -> Device {
        Device::Cpu
    }
}

pub(crate) fn tensor<P: Place, T: Element + WithDType>(rows: &TokenRows) -> Result<Tensor, Error> {
    let values = rows.as_slice::<T>().unwrap();
    Ok(Tensor::from_slice(values, &rows.shape(), &P::device())?)
}

impl<P: Place, T: Element + WithDType> Harness for On<P, T> {
    type Backend = Candle;
    const DTYPE: DType = <T as Element>::DTYPE;

    fn source(rows: &TokenRows) -> Result<CandleTable, Error> {
        CandleTable::new(tensor::<P, T>(rows)?)
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Tensor, Error> {
        tensor::<P, T>(values)
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
        let mut loss = Tensor::zeros((), <T as WithDType>::DTYPE, &P::device())?;
        for (plan, upstream) in &pass.lookups {
            let out = layer.lookup_planned(plan)?;
            loss = (loss + (out * tensor::<P, T>(upstream)?)?.sum_all()?)?;
        }
        let mut leaves = Vec::new();
        for head in &pass.heads {
            let leaf = Var::from_tensor(&tensor::<P, T>(&head.hidden)?)?;
            let hidden = leaf.as_tensor().clone();
            let out = match head.adapters() {
                None => layer.logits(hidden)?,
                Some(adapters) => layer.logits_mixed(hidden, &adapters)?,
            };
            loss = (loss + (out * tensor::<P, T>(&head.upstream)?)?.sum_all()?)?;
            leaves.push(leaf);
        }
        for pass in &pass.losses {
            let leaf = Var::from_tensor(&tensor::<P, T>(&pass.hidden)?)?;
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

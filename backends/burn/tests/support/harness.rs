//! The backend on Flex, as the conformance kit drives it.
#![allow(dead_code)]

use std::marker::PhantomData;

use burn::tensor::{Device, Element as BurnElement, Tensor, TensorData};
use trainable_tokens_burn::{Burn, BurnTable, Error, backward};
use trainable_tokens_core::{DType, Element, TokenRows};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Tables of the element type `T`.
pub(crate) struct OnFlex<T>(PhantomData<T>);

pub(crate) fn tensor<T: Element + BurnElement>(rows: &TokenRows) -> Tensor<2> {
    let data = TensorData::new(rows.as_slice::<T>().unwrap().to_vec(), rows.shape());
    Tensor::from_data(data, (&Device::flex().autodiff(), T::dtype()))
}

impl<T: Element + BurnElement> Harness for OnFlex<T> {
    type Backend = Burn;
    const DTYPE: DType = <T as Element>::DTYPE;

    fn source(rows: &TokenRows) -> Result<BurnTable, Error> {
        BurnTable::new(tensor::<T>(rows))
    }

    fn hidden(_: &Layer<Self>, values: &TokenRows) -> Result<Tensor<2>, Error> {
        Ok(tensor::<T>(values))
    }

    fn read(values: &Tensor<2>) -> Result<TokenRows, Error> {
        let [rows, columns] = values.dims();
        if values.dtype() != T::dtype() {
            // The loss of a table of half precision.
            let values = values.to_data().try_into_vec::<f32>()?;
            return Ok(TokenRows::new(values, rows, columns)?);
        }
        let values = values.to_data().try_into_vec::<T>()?;
        Ok(TokenRows::new(values, rows, columns)?)
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error> {
        // A leaf of its own: burn has no backward pass from a loss that depends on none, as over a merged layer.
        let leaf = Tensor::<1>::zeros([1], (&Device::flex().autodiff(), T::dtype())).require_grad();
        let mut loss = leaf;
        for (plan, upstream) in &pass.lookups {
            loss = loss + (layer.lookup_planned(plan)? * tensor::<T>(upstream)).sum();
        }
        let mut leaves = Vec::new();
        for head in &pass.heads {
            let leaf = tensor::<T>(&head.hidden).require_grad();
            let out = match head.adapters() {
                None => layer.logits(leaf.clone())?,
                Some(adapters) => layer.logits_mixed(leaf.clone(), &adapters)?,
            };
            loss = loss + (out * tensor::<T>(&head.upstream)).sum();
            leaves.push(leaf);
        }
        for pass in &pass.losses {
            let leaf = tensor::<T>(&pass.hidden).require_grad();
            let out = layer.linear_cross_entropy(leaf.clone(), &pass.labels, pass.options)?;
            loss = loss + out.sum().mul_scalar(pass.upstream).cast(T::dtype());
            leaves.push(leaf);
        }
        let gradients = backward(&loss)?;
        let hidden = leaves
            .iter()
            .map(|leaf| Self::read(&leaf.grad(&gradients).unwrap()));
        let hidden = hidden.collect::<Result<_, Error>>()?;
        Ok(PassGradients { gradients, hidden })
    }
}

//! The whole conformance kit, on Flex.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::marker::PhantomData;

use burn::tensor::{Device, Element as BurnElement, Tensor, TensorData};
use half::{bf16, f16};
use trainable_tokens_burn::{Burn, BurnTable, Error, backward};
use trainable_tokens_core::{DType, Element, TokenRows};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients, conformance_tests};

/// Tables of the element type `T`.
struct OnFlex<T>(PhantomData<T>);

fn tensor<T: Element + BurnElement>(rows: &TokenRows) -> Tensor<2> {
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
        for (hidden, upstream) in &pass.heads {
            let leaf = tensor::<T>(hidden).require_grad();
            loss = loss + (layer.logits(leaf.clone())? * tensor::<T>(upstream)).sum();
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

conformance_tests! { f64: OnFlex<f64>, f32: OnFlex<f32>, f16: OnFlex<f16>, bf16: OnFlex<bf16> }

//! The backend, as the conformance kit drives it.
#![allow(dead_code)]

use std::marker::PhantomData;

use dfdx::shapes::HasShape;
use dfdx::tensor::{Cpu, CpuError, OwnedTape, PutTape, SplitTape, Tensor, TensorFromVec, Trace};
use dfdx::tensor_ops::{Backward, Device, SumTo, TryAdd, TryMul};
use trainable_tokens_core::{DType, TokenRows};
use trainable_tokens_dfdx::{Dfdx, DfdxDevice, DfdxElement, DfdxTable, Error};
use trainable_tokens_testkit::{Harness, Layer, Pass, PassGradients};

/// Tables of the element type `E`, and values of their type.
pub(crate) struct OnCpu<E>(PhantomData<E>);

pub(crate) type Matrix<E> = Tensor<(usize, usize), E, Cpu>;
type Loss<E> = Tensor<(), E, Cpu, OwnedTape<E, Cpu>>;

fn failed(error: CpuError) -> Error {
    Error::Dfdx {
        message: error.to_string(),
    }
}

pub(crate) fn tensor<E: DfdxElement>(rows: &TokenRows) -> Result<Matrix<E>, Error> {
    let [n, d] = rows.shape();
    let values = rows.as_slice::<E>().unwrap().to_vec();
    Cpu::default().try_tensor_from_vec(values, (n, d)).map_err(failed)
}

fn read<E: DfdxElement, T>(tensor: &Tensor<(usize, usize), E, Cpu, T>) -> Result<TokenRows, Error> {
    let (n, d) = *tensor.shape();
    // dfdx cannot read a tensor without elements.
    let values = if n * d == 0 { Vec::new() } else { tensor.as_vec() };
    Ok(TokenRows::new(values, n, d)?)
}

/// The sum of the elements, each multiplied by its upstream gradient.
fn loss<E: DfdxElement>(
    out: Tensor<(usize, usize), E, Cpu, OwnedTape<E, Cpu>>,
    upstream: &TokenRows,
) -> Result<Loss<E>, Error>
where
    Cpu: Device<E>,
{
    let (n, d) = *out.shape();
    if n * d == 0 {
        // dfdx cannot sum a tensor without elements.
        let (_, tape) = out.split_tape();
        return Ok(zero()?.put_tape(tape));
    }
    let weighted = out.try_mul(tensor(upstream)?).map_err(failed)?;
    weighted.try_sum::<(), _>().map_err(failed)
}

fn zero<E: DfdxElement>() -> Result<Tensor<(), E, Cpu>, Error> {
    Cpu::default()
        .try_tensor_from_vec(vec![E::default()], ())
        .map_err(failed)
}

impl<E: DfdxElement> Harness for OnCpu<E>
where
    Cpu: DfdxDevice<E>,
{
    type Backend = Dfdx<E>;
    const DTYPE: DType = E::DTYPE;

    fn source(rows: &TokenRows) -> Result<DfdxTable<E>, Error> {
        DfdxTable::new(tensor(rows)?)
    }

    fn hidden(
        _: &Layer<Self>,
        values: &TokenRows,
    ) -> Result<Tensor<(usize, usize), E, Cpu, OwnedTape<E, Cpu>>, Error> {
        Ok(tensor(values)?.leaky_trace())
    }

    fn read(values: &Tensor<(usize, usize), E, Cpu, OwnedTape<E, Cpu>>) -> Result<TokenRows, Error> {
        read(values)
    }

    fn backward(layer: &Layer<Self>, pass: &Pass) -> Result<PassGradients<Self>, Error> {
        let mut total: Loss<E> = zero()?.put_tape(OwnedTape::default());
        for (plan, upstream) in &pass.lookups {
            let out = layer.lookup_planned(plan)?;
            total = total.try_add(loss(out, upstream)?).map_err(failed)?;
        }
        let mut leaves = Vec::new();
        for head in &pass.heads {
            let leaf: Matrix<E> = tensor(&head.hidden)?;
            let out = match head.adapters() {
                None => layer.logits(leaf.leaky_trace())?,
                Some(adapters) => layer.logits_mixed(leaf.leaky_trace(), &adapters)?,
            };
            total = total.try_add(loss(out, &head.upstream)?).map_err(failed)?;
            leaves.push(leaf);
        }
        let gradients = total.try_backward().map_err(failed)?;
        let hidden = leaves.iter().map(|leaf| read(&gradients.get(leaf)));
        let hidden = hidden.collect::<Result<_, Error>>()?;
        Ok(PassGradients { gradients, hidden })
    }
}

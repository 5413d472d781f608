//! dfdx.

use ::dfdx::tensor::{Cpu, NoneTape, OwnedTape, SplitTape, Tensor, TensorFromVec};
use ::dfdx::tensor_ops::{Backward, Device, GatherTo, SumTo};
use trainable_tokens::dfdx::{DfdxDevice, DfdxElement, TrainableTokens};
use trainable_tokens::{Adam, AdamConfig};

use crate::support::Workload;
use crate::{Case, Laps, Measured, measure};

type Matrix<E> = Tensor<(usize, usize), E, Cpu>;

pub(crate) fn run<E: DfdxElement>(workload: Workload, rounds: usize, _: E) -> Measured
where
    Cpu: DfdxDevice<E> + Device<E>,
{
    let device = Cpu::default();
    let shape = (workload.vocab_size, workload.dim);
    let weight: Matrix<E> = device.tensor_from_vec(workload.table(), shape);
    measure(rounds, || Dfdx {
        layer: TrainableTokens::from_tensor(weight.clone(), &workload.trained_ids()).unwrap(),
        optimizer: Adam::new(AdamConfig::ADAMW).unwrap(),
        ids: workload.batch(),
        indices: device.tensor_from_vec(workload.indices(), (workload.tokens,)),
        weight,
    })
}

struct Dfdx<E: DfdxElement>
where
    Cpu: DfdxDevice<E>,
{
    weight: Matrix<E>,
    layer: TrainableTokens<E>,
    optimizer: Adam,
    ids: Vec<u32>,
    indices: Tensor<(usize,), usize, Cpu>,
}

impl<E: DfdxElement> Case for Dfdx<E>
where
    Cpu: DfdxDevice<E> + Device<E>,
{
    type Rows = Tensor<(usize, usize), E, Cpu, NoneTape>;

    fn frozen(&mut self) -> Self::Rows {
        self.weight.clone().gather(self.indices.clone())
    }

    fn step(&mut self, laps: &mut Laps) -> Self::Rows {
        let rows = self.layer.lookup(&self.ids, OwnedTape::default()).unwrap();
        laps.lap();
        let (rows, tape) = rows.split_tape();
        // From a gradient of ones.
        let loss = ::dfdx::tensor::PutTape::put_tape(rows.clone(), tape).sum::<(), _>();
        let gradients = loss.backward();
        laps.lap();
        self.layer
            .step(&gradients, &mut self.optimizer, &mut [])
            .unwrap();
        laps.lap();
        rows
    }
}

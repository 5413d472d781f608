//! dfdx.

use ::dfdx::tensor::{
    Cpu, Gradients, NoneTape, OwnedTape, PutTape, SplitTape, Tape, Tensor, TensorFromVec, ZerosTensor,
};
use ::dfdx::tensor_ops::{Backward, Device, GatherTo};
use trainable_tokens::dfdx::{DfdxDevice, DfdxElement, TrainableTokens};
use trainable_tokens::{Adam, AdamConfig};

use super::{Case, Laps, Workload};

type Matrix<E> = Tensor<(usize, usize), E, Cpu>;

/// Makes the table; the function makes the layer.
pub(crate) fn case<E: DfdxElement>(workload: Workload, _: E) -> impl FnOnce() -> Dfdx<E>
where
    Cpu: DfdxDevice<E> + Device<E>,
{
    let device = Cpu::default();
    let shape = (workload.vocab_size, workload.dim);
    let weight: Matrix<E> = device.tensor_from_vec(workload.table(), shape);
    move || Dfdx {
        layer: TrainableTokens::from_tensor(weight.clone(), &workload.trained_ids()).unwrap(),
        optimizer: Adam::new(AdamConfig::ADAMW).unwrap(),
        ids: workload.batch(),
        indices: device.tensor_from_vec(workload.indices(), (workload.tokens,)),
        weight,
    }
}

pub(crate) struct Dfdx<E: DfdxElement>
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

    fn lookup(&mut self) -> Self::Rows {
        self.layer.lookup(&self.ids, NoneTape).unwrap()
    }

    fn step(&mut self, laps: &mut Laps) -> Self::Rows {
        let rows = self.layer.lookup(&self.ids, OwnedTape::default()).unwrap();
        laps.lap();
        // From a gradient of ones, without the slow sum that would have it.
        let (rows, mut tape) = rows.split_tape();
        let of_rows = rows.clone();
        tape.add_backward_op(move |gradients| ones(&of_rows, gradients));
        let loss: Tensor<(), E, Cpu> = rows.device().zeros();
        let gradients = loss.put_tape(tape).backward();
        laps.lap();
        self.layer.step(&gradients, &mut self.optimizer, &mut []).unwrap();
        laps.lap();
        rows
    }
}

/// Makes the gradient of a tensor ones.
fn ones<E: DfdxElement, D: Device<E>>(
    tensor: &Tensor<(usize, usize), E, D>,
    gradients: &mut Gradients<E, D>,
) -> Result<(), D::Err> {
    tensor
        .device()
        .try_fill_with_ones(gradients.get_or_alloc_mut(tensor)?)
}

//! burn, on its CPU backend Flex.

use ::burn::module::Param;
use ::burn::nn::Embedding;
use ::burn::tensor::{Device, Element as BurnElement, Int, Tensor, TensorData};
use trainable_tokens::burn::{TrainableTokens, backward};
use trainable_tokens::{Adam, AdamConfig, Element};

use super::{Case, Laps, Workload};

/// Makes the table; the function makes the layer.
pub(crate) fn case<T: Element + BurnElement>(workload: Workload, _: T) -> impl FnOnce() -> Burn {
    let device = Device::flex().autodiff();
    let data = TensorData::new(workload.table::<T>(), [workload.vocab_size, workload.dim]);
    let weight = Tensor::<2>::from_data(data, (&device, T::dtype()));
    move || {
        let embedding = Embedding {
            weight: Param::from_tensor(weight).set_require_grad(false),
        };
        let ids = TensorData::new(workload.signed(), [1, workload.tokens]);
        Burn {
            layer: TrainableTokens::wrap(embedding.clone(), &workload.trained_ids()).unwrap(),
            optimizer: Adam::new(AdamConfig::ADAMW).unwrap(),
            ids: Tensor::from_data(ids, &device),
            embedding,
        }
    }
}

pub(crate) struct Burn {
    embedding: Embedding,
    layer: TrainableTokens,
    optimizer: Adam,
    ids: Tensor<2, Int>,
}

impl Case for Burn {
    type Rows = Tensor<3>;

    fn frozen(&mut self) -> Tensor<3> {
        self.embedding.forward(self.ids.clone())
    }

    fn lookup(&mut self) -> Tensor<3> {
        self.layer.forward(self.ids.clone())
    }

    fn step(&mut self, laps: &mut Laps) -> Tensor<3> {
        let rows = self.lookup();
        laps.lap();
        // Of a tensor that is no scalar: from a gradient of ones.
        let gradients = backward(&rows).unwrap();
        laps.lap();
        self.layer.step(&gradients, &mut self.optimizer, &mut []).unwrap();
        laps.lap();
        rows
    }
}

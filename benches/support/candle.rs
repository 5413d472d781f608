//! candle.

use candle_core::{Device, Tensor, WithDType};
use candle_nn::{Embedding, Module};
use trainable_tokens::candle::TrainableTokens;
use trainable_tokens::{Adam, AdamConfig, Element};

use super::{Case, Laps, Workload};

/// Makes the table; the function makes the layer.
pub(crate) fn case<T: Element + WithDType>(
    workload: Workload,
    _: T,
    device: &Device,
) -> impl FnOnce() -> Candle {
    let shape = (workload.vocab_size, workload.dim);
    let weights = Tensor::from_vec(workload.table::<T>(), shape, device).unwrap();
    let device = device.clone();
    move || {
        let embedding = Embedding::new(weights, workload.dim);
        let ids = (1, workload.tokens);
        Candle {
            layer: TrainableTokens::wrap(embedding.clone(), &workload.trained_ids()).unwrap(),
            optimizer: Adam::new(AdamConfig::ADAMW).unwrap(),
            ids: Tensor::from_vec(workload.batch(), ids, &device).unwrap(),
            embedding,
        }
    }
}

pub(crate) struct Candle {
    embedding: Embedding,
    layer: TrainableTokens,
    optimizer: Adam,
    ids: Tensor,
}

impl Case for Candle {
    type Rows = Tensor;

    fn frozen(&mut self) -> Tensor {
        let rows = self.embedding.forward(&self.ids).unwrap();
        self.wait();
        rows
    }

    fn lookup(&mut self) -> Tensor {
        self.layer.forward(&self.ids).unwrap()
    }

    fn step(&mut self, laps: &mut Laps) -> Tensor {
        let rows = self.lookup();
        self.wait();
        laps.lap();
        // Of a tensor that is no scalar: from a gradient of ones.
        let gradients = rows.backward().unwrap();
        self.wait();
        laps.lap();
        self.layer.step(&gradients, &mut self.optimizer, &mut []).unwrap();
        self.wait();
        laps.lap();
        rows
    }
}

impl Candle {
    /// Until the device has done what it was told.
    fn wait(&self) {
        self.ids.device().synchronize().unwrap();
    }
}

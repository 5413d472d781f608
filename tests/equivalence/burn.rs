//! The model in burn.

#[path = "../../backends/burn/tests/support/harness.rs"]
mod harness;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use trainable_tokens::{LookupPlan, TokenRows};
use trainable_tokens_testkit::Layer;

use super::run::Model;

pub(crate) type Harness = harness::OnFlex<f32>;

impl Model for Harness {
    fn loss(
        layer: &Layer<Self>,
        projection: &TokenRows,
        plan: &LookupPlan,
        targets: &[u32],
    ) -> (f64, Gradients) {
        let hidden = layer
            .lookup_planned(plan)
            .unwrap()
            .matmul(harness::tensor::<f32>(projection));
        let logits = layer.logits(hidden).unwrap();
        let targets: Vec<i64> = targets.iter().map(|id| i64::from(*id)).collect();
        let shape = [targets.len(), 1];
        let device = Device::flex().autodiff();
        let targets = Tensor::<2, Int>::from_data(TensorData::new(targets, shape), &device);
        let loss = log_softmax(logits, 1).gather(1, targets).mean().neg();
        let value: f32 = loss.clone().into_scalar();
        (f64::from(value), loss.backward())
    }
}

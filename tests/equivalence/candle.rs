//! The model in candle.

#[path = "../../backends/candle/tests/support/harness.rs"]
mod harness;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use trainable_tokens::{LookupPlan, TokenRows};
use trainable_tokens_testkit::Layer;

use super::run::Model;

pub(crate) type Harness = harness::OnCpu<f32>;

impl Model for Harness {
    fn loss(
        layer: &Layer<Self>,
        projection: &TokenRows,
        plan: &LookupPlan,
        targets: &[u32],
    ) -> (f64, GradStore) {
        let projection = harness::tensor::<harness::Cpu, f32>(projection).unwrap();
        let hidden = layer.lookup_planned(plan).unwrap().matmul(&projection).unwrap();
        let logits = layer.logits(hidden).unwrap();
        let targets = Tensor::from_slice(targets, targets.len(), &Device::Cpu).unwrap();
        let loss = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
        let value = loss.to_scalar::<f32>().unwrap();
        (f64::from(value), loss.backward().unwrap())
    }
}

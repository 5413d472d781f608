//! The model in dfdx.

#[path = "../../backends/dfdx/tests/support/harness.rs"]
mod harness;

use dfdx::losses::cross_entropy_with_logits_loss;
use dfdx::prelude::{AsArray, Backward, Cpu, Gradients, TensorFromVec, TryMatMul};
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
    ) -> (f64, Gradients<f32, Cpu>) {
        let projection = harness::tensor::<f32>(projection).unwrap();
        let hidden = layer
            .lookup_planned(plan)
            .unwrap()
            .try_matmul(projection)
            .unwrap();
        let logits = layer.logits(hidden).unwrap();
        let (n, v) = (targets.len(), layer.tokens().vocab_size());
        let mut chosen = vec![0f32; n * v];
        for (row, target) in chosen.chunks_exact_mut(v).zip(targets) {
            row[*target as usize] = 1.0;
        }
        let chosen = Cpu::default().tensor_from_vec(chosen, (n, v));
        let loss = cross_entropy_with_logits_loss(logits, chosen);
        (f64::from(loss.array()), loss.backward())
    }
}

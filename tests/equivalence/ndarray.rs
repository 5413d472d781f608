//! The model in ndarray: every backward pass by hand.

#[path = "../../backends/ndarray/tests/support/harness.rs"]
mod harness;

use ndarray::{Array2, Axis};
use trainable_tokens::ndarray::{NdGradient, TrainableTokensExt};
use trainable_tokens::{LookupPlan, TokenRows};
use trainable_tokens_testkit::Layer;

use super::run::Model;

pub(crate) type Harness = harness::Nd<f32>;

impl Model for Harness {
    fn loss(
        layer: &Layer<Self>,
        projection: &TokenRows,
        plan: &LookupPlan,
        targets: &[u32],
    ) -> (f64, NdGradient) {
        let projection: Array2<f32> = harness::array(projection);
        let hidden = layer.lookup_planned(plan).unwrap().dot(&projection);
        let logits = layer.logits(hidden.clone()).unwrap();

        let largest = logits
            .fold_axis(Axis(1), f32::NEG_INFINITY, |a, b| a.max(*b))
            .insert_axis(Axis(1));
        let mut gradient = (logits - largest).mapv(f32::exp);
        gradient /= &gradient.sum_axis(Axis(1)).insert_axis(Axis(1));
        let (n, mut loss) = (targets.len() as f32, 0.0);
        for (mut row, target) in gradient.outer_iter_mut().zip(targets) {
            loss -= row[*target as usize].ln() / n;
            row[*target as usize] -= 1.0;
            row /= n;
        }

        let mut rows = layer.zero_gradient();
        let hidden_gradient = layer
            .logits_backward(hidden.view(), gradient.view(), &mut rows)
            .unwrap();
        let upstream = hidden_gradient.dot(&projection.t());
        layer.backward_into(plan, upstream.view(), &mut rows).unwrap();
        (f64::from(loss), rows)
    }
}

//! Every case that PEFT made, and its loss in burn's own graph.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use burn::module::Param;
use burn::nn::Embedding;
use burn::tensor::{DType, Device, Element as BurnElement, Int, Tensor, TensorData};
use half::{bf16, f16};
use harness::{OnFlex, tensor};
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{Element, TokenRows};
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_testkit::peft_tests;

peft_tests! { f32: OnFlex<f32>, f16: OnFlex<f16>, bf16: OnFlex<bf16> }

/// Batches of the trajectories: sequences, and tokens of each.
const SHAPE: [usize; 2] = [3, 7];

/// The part `index` of recorded values, `len` of them, in `f64`.
fn part(all: &TokenRows, index: usize, len: usize) -> Vec<f64> {
    all.to_f64_vec()[index * len..][..len].to_vec()
}

/// The module over a batch of two dimensions, and PEFT's mean square loss with its cast as nodes of burn's graph: from
/// the rows recorded before each step, the gradient recorded for it.
fn burns_graph<T: Element + BurnElement>(name: &str) {
    let device = Device::flex().autodiff();
    let case = Fixture::open(&fixtures().join(name)).unwrap();
    let tokens: Vec<u32> = case.tokens().ids().iter().map(|id| id.0).collect();
    let embed = Embedding {
        weight: Param::from_tensor(tensor::<T>(case.table())),
    };
    let initial = case.initial_rows().unwrap();
    let mut layer = TrainableTokens::with_rows(embed, &tokens, &initial).unwrap();
    let batch = SHAPE[0] * SHAPE[1];
    let batch_of = |name: &str, index: usize| {
        let ids = case.ids(name).unwrap()[index * batch..][..batch].to_vec();
        Tensor::<2, Int>::from_data(TensorData::new(ids, SHAPE), &device)
    };

    let out = layer.forward(batch_of("input_ids", 0));
    let shape = [SHAPE[0], SHAPE[1], initial.embedding_dim()];
    assert_eq!(out.dims(), shape);
    assert!(
        out.to_data().as_bytes() == case.rows("embed.noop").unwrap().to_le_bytes(),
        "{name}"
    );

    let target = case.rows("traj.mse_target").unwrap().to_f32_vec();
    let target = Tensor::<3>::from_data(TensorData::new(target, shape), &device);
    let operations = case.json()["operations"].as_array().unwrap();
    for trajectory in ["mse_sgd", "mse_adamw"] {
        let operation = operations.iter().find(|it| it["name"] == trajectory).unwrap();
        let [atol, rtol] = ["atol", "rtol"].map(|name| operation[name].as_f64().unwrap());
        let recorded = |what: &str| case.rows(&format!("traj.{trajectory}.{what}")).unwrap();
        let (deltas, grads) = (recorded("deltas"), recorded("grads"));
        let [k, dim] = initial.shape();
        for step in 0..grads.num_rows() / k {
            let rows = TokenRows::new(part(&deltas, step, k * dim), k, dim).unwrap();
            layer.set_rows(&rows).unwrap();
            let out = layer.forward(batch_of("traj.ids", step)).cast(DType::F32);
            let loss = (out - target.clone()).square().mean();
            let gradient = layer.gradient(&backward(&loss).unwrap()).unwrap();
            let want = part(&grads, step, k * dim);
            for (got, want) in gradient.to_f64_vec().into_iter().zip(want) {
                assert!(
                    (got - want).abs() <= atol + rtol * want.abs(),
                    "{name}, {trajectory}, step {step}: {got}, expected {want}"
                );
            }
        }
    }
}

#[test]
fn burns_graph_gives_pefts_gradients() {
    burns_graph::<f32>("standalone_f32");
    burns_graph::<f16>("standalone_f16");
    burns_graph::<bf16>("standalone_bf16");
    burns_graph::<bf16>("standalone_bf16_noautocast");
}

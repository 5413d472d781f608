//! Every case that PEFT made, and its loss in candle's own graph.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;
#[path = "support/harness.rs"]
mod harness;

use candle_core::{DType, Device, Tensor, WithDType};
use candle_nn::Module;
use common::bytes;
use half::{bf16, f16};
use harness::{Cpu, OnCpu, tensor};
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::{Element, TokenRows};
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_testkit::peft_tests;

peft_tests! { f32: OnCpu<f32>, f16: OnCpu<f16>, bf16: OnCpu<bf16> }

/// Batches of the trajectories: sequences, and tokens of each.
const SHAPE: (usize, usize) = (3, 7);

/// The part `index` of recorded values, `len` of them, in `f64`.
fn part(all: &TokenRows, index: usize, len: usize) -> Vec<f64> {
    all.to_f64_vec()[index * len..][..len].to_vec()
}

/// The layer as a module over a batch of two dimensions, and PEFT's mean square loss with its cast as nodes of candle's
/// graph: from the rows recorded before each step, the gradient recorded for it.
fn candles_graph<T: Element + WithDType>(name: &str) {
    let case = Fixture::open(&fixtures().join(name)).unwrap();
    let tokens: Vec<u32> = case.tokens().ids().iter().map(|id| id.0).collect();
    let table = tensor::<Cpu, T>(case.table()).unwrap();
    let initial = case.initial_rows().unwrap();
    let mut layer = TrainableTokens::with_rows(table, &tokens, &initial).unwrap();
    let batch = SHAPE.0 * SHAPE.1;
    let batch_of = |name: &str, index: usize| {
        let ids: Vec<i64> = case.ids(name).unwrap()[index * batch..][..batch]
            .iter()
            .map(|id| i64::from(*id))
            .collect();
        Tensor::from_vec(ids, SHAPE, &Device::Cpu).unwrap()
    };

    let out = layer.forward(&batch_of("input_ids", 0)).unwrap();
    assert_eq!(out.dims(), [SHAPE.0, SHAPE.1, initial.embedding_dim()]);
    assert!(
        bytes(&out) == case.rows("embed.noop").unwrap().to_le_bytes(),
        "{name}"
    );

    let target = case.rows("traj.mse_target").unwrap();
    let target = Tensor::from_vec(target.to_f32_vec(), out.shape(), &Device::Cpu).unwrap();
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
            let out = layer.forward(&batch_of("traj.ids", step)).unwrap();
            let error = (out.to_dtype(DType::F32).unwrap() - &target).unwrap();
            let loss = error.sqr().unwrap().mean_all().unwrap();
            let gradient = layer.gradient(&loss.backward().unwrap()).unwrap();
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
fn candles_graph_gives_pefts_gradients() {
    candles_graph::<f32>("standalone_f32");
    candles_graph::<f16>("standalone_f16");
    candles_graph::<bf16>("standalone_bf16");
    candles_graph::<bf16>("standalone_bf16_noautocast");
}

//! A whole training step of the embedding, along each size, and the parts of it that no framework takes part in.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench step`, with a part of a name behind it for some of them
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use candle_core::Device;
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use support::workload::REFERENCE;
use support::{Case, Laps, Workload, burn, candle, dfdx, ndarray, quick};
use trainable_tokens::{
    Adam, AdamConfig, DType, LayerOptions, LookupPlan, RowOptimizer, Sgd, SgdConfig, TokenRows,
};

fn step<C: Case>(criterion: &mut Criterion, name: &str, workload: Workload, make: impl FnOnce() -> C) {
    let mut group = quick(criterion, &format!("step/{name}"));
    let mut case = make();
    group.bench_function(workload.to_string(), |b| b.iter(|| case.step(&mut Laps::start())));
}

fn ndarray_step(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        step(criterion, "ndarray", workload, ndarray::fresh(workload, 0f32));
        step(
            criterion,
            "ndarray, reused buffers",
            workload,
            ndarray::reused(workload, 0f32),
        );
    }
    step(
        criterion,
        "ndarray, bf16",
        REFERENCE,
        ndarray::fresh(REFERENCE, bf16::ZERO),
    );
    step(
        criterion,
        "ndarray, f16",
        REFERENCE,
        ndarray::fresh(REFERENCE, f16::ZERO),
    );
}

fn candle_step(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        step(
            criterion,
            "candle",
            workload,
            candle::case(workload, 0f32, &Device::Cpu),
        );
    }
    step(
        criterion,
        "candle, bf16",
        REFERENCE,
        candle::case(REFERENCE, bf16::ZERO, &Device::Cpu),
    );
}

fn burn_step(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        step(criterion, "burn", workload, burn::case(workload, 0f32));
    }
    step(
        criterion,
        "burn, bf16",
        REFERENCE,
        burn::case(REFERENCE, bf16::ZERO),
    );
}

fn dfdx_step(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        step(criterion, "dfdx", workload, dfdx::case(workload, 0f32));
    }
    step(
        criterion,
        "dfdx, f16",
        REFERENCE,
        dfdx::case(REFERENCE, f16::ZERO),
    );
}

/// Planning a batch, in new memory and in that of the plan before.
fn plan(criterion: &mut Criterion) {
    let mut group = quick(criterion, "plan");
    for workload in [512, 4096, 16_384].map(|tokens| Workload { tokens, ..REFERENCE }) {
        let (tokens, ids) = (workload.token_set(), workload.batch());
        let options = LayerOptions::default();
        group.bench_function(format!("new/{workload}"), |b| {
            b.iter(|| LookupPlan::new(&tokens, options, &ids).unwrap());
        });
        let mut plan = LookupPlan::new(&tokens, options, &ids).unwrap();
        group.bench_function(format!("rebuilt/{workload}"), |b| {
            b.iter(|| plan.rebuild(&tokens, options, &ids).unwrap());
        });
    }
}

/// The update of rows alone.
fn optimizer(criterion: &mut Criterion) {
    let mut group = quick(criterion, "optimizer");
    for num_rows in [1, 128, 1000, 30_000] {
        for dtype in [DType::F32, DType::BF16] {
            let mut rows = TokenRows::zeros(dtype, num_rows, REFERENCE.dim);
            let gradient = TokenRows::zeros(dtype, num_rows, REFERENCE.dim);
            let momentum = SgdConfig {
                momentum: 0.9,
                ..SgdConfig::default()
            };
            let optimizers: [(&str, Box<dyn RowOptimizer>); 3] = [
                ("AdamW", Box::new(Adam::new(AdamConfig::ADAMW).unwrap())),
                ("SGD", Box::new(Sgd::new(SgdConfig::default()).unwrap())),
                ("SGD with momentum", Box::new(Sgd::new(momentum).unwrap())),
            ];
            for (name, mut optimizer) in optimizers {
                group.bench_function(format!("{name}, {dtype}/k={num_rows}"), |b| {
                    b.iter(|| optimizer.step(&mut rows, &gradient, 1e-3).unwrap());
                });
            }
        }
    }
}

criterion_group!(
    benches,
    ndarray_step,
    candle_step,
    burn_step,
    dfdx_step,
    plan,
    optimizer
);
criterion_main!(benches);

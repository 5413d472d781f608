//! A lookup with trained rows beside the frozen lookup of the same framework, along each size.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench lookup`, with a part of a name behind it for some of them
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use candle_core::Device;
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use support::workload::REFERENCE;
use support::{Case, Workload, burn, candle, dfdx, ndarray, quick};

/// `make` makes the layer when it is known that it is asked for: some tables are large.
fn both<C: Case>(criterion: &mut Criterion, name: &str, workload: Workload, make: impl FnOnce() -> C) {
    let mut group = quick(criterion, &format!("lookup/{name}"));
    let mut case = make();
    group.bench_function(format!("frozen/{workload}"), |b| b.iter(|| case.frozen()));
    group.bench_function(format!("trained/{workload}"), |b| b.iter(|| case.lookup()));
}

fn ndarray_lookup(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        both(criterion, "ndarray", workload, ndarray::fresh(workload, 0f32));
        both(
            criterion,
            "ndarray, reused buffers",
            workload,
            ndarray::reused(workload, 0f32),
        );
    }
    both(
        criterion,
        "ndarray, bf16",
        REFERENCE,
        ndarray::fresh(REFERENCE, bf16::ZERO),
    );
    both(
        criterion,
        "ndarray, f16",
        REFERENCE,
        ndarray::fresh(REFERENCE, f16::ZERO),
    );
}

fn candle_lookup(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        both(
            criterion,
            "candle",
            workload,
            candle::case(workload, 0f32, &Device::Cpu),
        );
    }
    both(
        criterion,
        "candle, bf16",
        REFERENCE,
        candle::case(REFERENCE, bf16::ZERO, &Device::Cpu),
    );
    both(
        criterion,
        "candle, f16",
        REFERENCE,
        candle::case(REFERENCE, f16::ZERO, &Device::Cpu),
    );
}

fn burn_lookup(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        both(criterion, "burn", workload, burn::case(workload, 0f32));
    }
    both(
        criterion,
        "burn, bf16",
        REFERENCE,
        burn::case(REFERENCE, bf16::ZERO),
    );
    both(
        criterion,
        "burn, f16",
        REFERENCE,
        burn::case(REFERENCE, f16::ZERO),
    );
}

fn dfdx_lookup(criterion: &mut Criterion) {
    for workload in Workload::sweep() {
        both(criterion, "dfdx", workload, dfdx::case(workload, 0f32));
    }
    both(
        criterion,
        "dfdx, f16",
        REFERENCE,
        dfdx::case(REFERENCE, f16::ZERO),
    );
}

criterion_group!(benches, ndarray_lookup, candle_lookup, burn_lookup, dfdx_lookup);
criterion_main!(benches);

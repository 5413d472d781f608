//! A whole training step of the embedding: lookup, backward pass, AdamW.
//!
//! `cargo bench --features ndarray,candle --bench step`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use candle_core::{Device, Tensor};
use candle_nn::Module;
use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::Array2;
use support::{DIM, TOKENS, VOCABULARIES, batch, table, trained_ids};
use trainable_tokens::candle;
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{Adam, AdamConfig, TokenSet};

fn ndarray_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step/ndarray");
    group.sample_size(20);
    for v in VOCABULARIES {
        let array = Array2::from_shape_vec((v, DIM), table(v)).unwrap();
        let tokens = TokenSet::new(trained_ids(v), v).unwrap();
        let mut layer: TrainableTokens<_> =
            TrainableTokens::new(NdTable::new(array).unwrap(), tokens).unwrap();
        let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
        let (ids, upstream) = (batch(v), Array2::<f32>::ones((TOKENS, DIM)));
        group.bench_function(format!("fresh buffers/V={v}"), |b| {
            b.iter(|| {
                let plan = layer.plan(&ids).unwrap();
                let rows = layer.lookup_planned(&plan).unwrap();
                let gradient = layer.backward(&plan, upstream.view()).unwrap();
                layer.step_with(gradient, &mut optimizer, &mut []).unwrap();
                rows
            });
        });
        let mut plan = layer.plan(&ids).unwrap();
        let mut out = Array2::<f32>::zeros((TOKENS, DIM));
        group.bench_function(format!("reused buffers/V={v}"), |b| {
            b.iter(|| {
                plan.rebuild(layer.tokens(), layer.options(), &ids).unwrap();
                layer.lookup_into(&plan, out.view_mut()).unwrap();
                let gradient = layer.backward(&plan, upstream.view()).unwrap();
                layer.step_with(gradient, &mut optimizer, &mut []).unwrap()
            });
        });
    }
}

fn candle_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step/candle");
    group.sample_size(20);
    for v in VOCABULARIES {
        let weights = Tensor::from_vec(table(v), (v, DIM), &Device::Cpu).unwrap();
        let mut layer = candle::TrainableTokens::from_tensor(weights, &trained_ids(v)).unwrap();
        let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
        let ids = Tensor::from_vec(batch(v), TOKENS, &Device::Cpu).unwrap();
        group.bench_function(format!("fresh buffers/V={v}"), |b| {
            b.iter(|| {
                let loss = layer.forward(&ids).unwrap().sum_all().unwrap();
                layer
                    .step(&loss.backward().unwrap(), &mut optimizer, &mut [])
                    .unwrap()
            });
        });
    }
}

criterion_group!(benches, ndarray_step, candle_step);
criterion_main!(benches);

//! A lookup with trained rows beside the frozen lookup of the same framework.
//!
//! `cargo bench --features ndarray,candle --bench lookup`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use candle_core::{Device, Tensor};
use candle_nn::{Embedding, Module};
use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::{Array2, Axis};
use support::{DIM, TOKENS, VOCABULARIES, batch, table, trained_ids};
use trainable_tokens::TokenSet;
use trainable_tokens::candle;
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};

fn ndarray_lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup/ndarray");
    for v in VOCABULARIES {
        let array = Array2::from_shape_vec((v, DIM), table(v)).unwrap();
        let ids = batch(v);
        let rows: Vec<usize> = ids.iter().map(|id| *id as usize).collect();
        group.bench_function(format!("frozen/V={v}"), |b| {
            b.iter(|| array.select(Axis(0), &rows));
        });
        let tokens = TokenSet::new(trained_ids(v), v).unwrap();
        let layer: TrainableTokens<_> = TrainableTokens::new(NdTable::new(array).unwrap(), tokens).unwrap();
        group.bench_function(format!("trained/V={v}"), |b| {
            b.iter(|| layer.lookup(&ids).unwrap());
        });
        let mut plan = layer.plan(&ids).unwrap();
        let mut out = Array2::<f32>::zeros((TOKENS, DIM));
        group.bench_function(format!("trained into a reused buffer/V={v}"), |b| {
            b.iter(|| {
                plan.rebuild(layer.tokens(), layer.options(), &ids).unwrap();
                layer.lookup_into(&plan, out.view_mut()).unwrap();
            });
        });
    }
}

fn candle_lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup/candle");
    for v in VOCABULARIES {
        let weights = Tensor::from_vec(table(v), (v, DIM), &Device::Cpu).unwrap();
        let embedding = Embedding::new(weights, DIM);
        let ids = Tensor::from_vec(batch(v), TOKENS, &Device::Cpu).unwrap();
        group.bench_function(format!("frozen/V={v}"), |b| {
            b.iter(|| embedding.forward(&ids).unwrap());
        });
        let layer = candle::TrainableTokens::wrap(embedding, &trained_ids(v)).unwrap();
        group.bench_function(format!("trained/V={v}"), |b| {
            b.iter(|| layer.forward(&ids).unwrap());
        });
    }
}

criterion_group!(benches, ndarray_lookup, candle_lookup);
criterion_main!(benches);

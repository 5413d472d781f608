//! A lookup with trained rows beside the frozen lookup of the same framework.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench lookup`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use burn::module::Param;
use burn::tensor::{Device as BurnDevice, Int, Tensor as BurnTensor, TensorData};
use candle_core::{Device, Tensor};
use candle_nn::{Embedding, Module};
use criterion::{Criterion, criterion_group, criterion_main};
use dfdx::tensor::{Cpu, NoneTape, Tensor as DfdxTensor, TensorFromVec};
use dfdx::tensor_ops::GatherTo;
use ndarray::{Array2, Axis};
use support::{DIM, TOKENS, VOCABULARIES, batch, table, trained_ids};
use trainable_tokens::TokenSet;
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{burn as on_burn, candle, dfdx as on_dfdx};

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

fn burn_lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup/burn");
    let device = BurnDevice::flex().autodiff();
    for v in VOCABULARIES {
        let weight = BurnTensor::<2>::from_data(TensorData::new(table(v), [v, DIM]), &device);
        let ids: Vec<i32> = batch(v).into_iter().map(u32::cast_signed).collect();
        let ids = BurnTensor::<2, Int>::from_data(TensorData::new(ids, [1, TOKENS]), &device);
        let embedding = burn::nn::Embedding {
            weight: Param::from_tensor(weight).set_require_grad(false),
        };
        group.bench_function(format!("frozen/V={v}"), |b| {
            b.iter(|| embedding.forward(ids.clone()));
        });
        let layer = on_burn::TrainableTokens::wrap(embedding, &trained_ids(v)).unwrap();
        group.bench_function(format!("trained/V={v}"), |b| {
            b.iter(|| layer.forward(ids.clone()));
        });
    }
}

fn dfdx_lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup/dfdx");
    let device = Cpu::default();
    for v in VOCABULARIES {
        let weight: DfdxTensor<(usize, usize), f32, Cpu> = device.tensor_from_vec(table(v), (v, DIM));
        let ids = batch(v);
        let rows = device.tensor_from_vec(ids.iter().map(|id| *id as usize).collect(), (TOKENS,));
        group.bench_function(format!("frozen/V={v}"), |b| {
            b.iter(|| weight.clone().gather(rows.clone()));
        });
        let layer = on_dfdx::TrainableTokens::from_tensor(weight, &trained_ids(v)).unwrap();
        group.bench_function(format!("trained/V={v}"), |b| {
            b.iter(|| layer.lookup(&ids, NoneTape).unwrap());
        });
    }
}

criterion_group!(benches, ndarray_lookup, candle_lookup, burn_lookup, dfdx_lookup);
criterion_main!(benches);

//! A whole training step of the embedding: lookup, backward pass, AdamW.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench step`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use burn::module::Param;
use burn::tensor::{Device as BurnDevice, Int, Tensor as BurnTensor, TensorData};
use candle_core::{Device, Tensor};
use candle_nn::Module;
use criterion::{Criterion, criterion_group, criterion_main};
use dfdx::tensor::{Cpu, OwnedTape, Tensor as DfdxTensor, TensorFromVec};
use dfdx::tensor_ops::{Backward, SumTo};
use ndarray::Array2;
use support::{DIM, TOKENS, VOCABULARIES, batch, table, trained_ids};
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{Adam, AdamConfig, TokenSet};
use trainable_tokens::{burn as on_burn, candle, dfdx as on_dfdx};

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
                let gradients = layer.backward(&plan, upstream.view()).unwrap();
                layer.step(&gradients, &mut optimizer, &mut []).unwrap();
                rows
            });
        });
        let mut plan = layer.plan(&ids).unwrap();
        let mut out = Array2::<f32>::zeros((TOKENS, DIM));
        let mut gradients = layer.zero_gradient();
        group.bench_function(format!("reused buffers/V={v}"), |b| {
            b.iter(|| {
                plan.rebuild(layer.tokens(), layer.options(), &ids).unwrap();
                layer.lookup_into(&plan, out.view_mut()).unwrap();
                gradients.zero();
                layer
                    .backward_into(&plan, upstream.view(), &mut gradients)
                    .unwrap();
                layer.step(&gradients, &mut optimizer, &mut []).unwrap()
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

fn burn_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step/burn");
    group.sample_size(20);
    let device = BurnDevice::flex().autodiff();
    for v in VOCABULARIES {
        let weight = BurnTensor::<2>::from_data(TensorData::new(table(v), [v, DIM]), &device);
        let embedding = burn::nn::Embedding {
            weight: Param::from_tensor(weight).set_require_grad(false),
        };
        let mut layer = on_burn::TrainableTokens::wrap(embedding, &trained_ids(v)).unwrap();
        let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
        let ids: Vec<i32> = batch(v).into_iter().map(u32::cast_signed).collect();
        let ids = BurnTensor::<2, Int>::from_data(TensorData::new(ids, [1, TOKENS]), &device);
        group.bench_function(format!("fresh buffers/V={v}"), |b| {
            b.iter(|| {
                let gradients = on_burn::backward(&layer.forward(ids.clone()).sum()).unwrap();
                layer.step(&gradients, &mut optimizer, &mut []).unwrap()
            });
        });
    }
}

fn dfdx_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step/dfdx");
    group.sample_size(20);
    for v in VOCABULARIES {
        let weight: DfdxTensor<(usize, usize), f32, Cpu> = Cpu::default().tensor_from_vec(table(v), (v, DIM));
        let mut layer = on_dfdx::TrainableTokens::from_tensor(weight, &trained_ids(v)).unwrap();
        let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
        let ids = batch(v);
        group.bench_function(format!("fresh buffers/V={v}"), |b| {
            b.iter(|| {
                let rows = layer.lookup(&ids, OwnedTape::default()).unwrap();
                let gradients = rows.sum::<(), _>().backward();
                layer.step(&gradients, &mut optimizer, &mut []).unwrap()
            });
        });
    }
}

criterion_group!(benches, ndarray_step, candle_step, burn_step, dfdx_step);
criterion_main!(benches);

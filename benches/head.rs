//! The tied head beside the frozen product of the same framework, its fused loss, and merging into the table.
//!
//! `cargo bench --features ndarray,candle,burn,dfdx --bench head`, with a part of a name behind it for some of them
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use ::burn::module::Param;
use ::burn::tensor::{Device as BurnDevice, Int, Tensor as BurnTensor, TensorData};
use ::dfdx::shapes::Axes2;
use ::dfdx::tensor::{Cpu, Tensor as DfdxTensor, TensorFromVec, Trace};
use ::dfdx::tensor_ops::{Backward, PermuteTo, SumTo, TryMatMul};
use ::ndarray::Array2;
use candle_core::{Device, Tensor, Var};
use candle_nn::Module;
use criterion::{Criterion, criterion_group, criterion_main};
use support::{Workload, quick};
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{CrossEntropyOptions, TokenRows, burn as on_burn, candle, dfdx as on_dfdx};

/// Hidden states of a batch.
const HIDDEN: usize = 256;

const WORKLOAD: Workload = Workload {
    dim: 768,
    ..Workload::of(32_000)
};

fn hidden() -> Vec<f32> {
    let mut values = WORKLOAD.upstream();
    values.truncate(HIDDEN * WORKLOAD.dim);
    values
}

/// The id that each hidden state must predict.
fn labels() -> Vec<i64> {
    WORKLOAD.batch().into_iter().take(HIDDEN).map(i64::from).collect()
}

/// Rows that differ from the base's, so that the head overrides their columns.
fn rows() -> TokenRows {
    let values = vec![0.5f32; WORKLOAD.rows * WORKLOAD.dim];
    TokenRows::new(values, WORKLOAD.rows, WORKLOAD.dim).unwrap()
}

fn ndarray_head(criterion: &mut Criterion) {
    let shape = (WORKLOAD.vocab_size, WORKLOAD.dim);
    let table = Array2::from_shape_vec(shape, WORKLOAD.table::<f32>()).unwrap();
    let hidden = Array2::from_shape_vec((HIDDEN, WORKLOAD.dim), hidden()).unwrap();
    let mut layer: TrainableTokens<_> =
        TrainableTokens::with_rows(NdTable::new(table).unwrap(), WORKLOAD.token_set(), &rows()).unwrap();
    let upstream = Array2::<f32>::ones((HIDDEN, WORKLOAD.vocab_size));
    let mut group = quick(criterion, "head/ndarray");
    group.bench_function("frozen", |b| b.iter(|| hidden.dot(&layer.source().view().t())));
    group.bench_function("trained", |b| b.iter(|| layer.logits(hidden.clone()).unwrap()));
    group.bench_function("trained, backward", |b| {
        b.iter(|| {
            let mut gradients = layer.zero_gradient();
            layer
                .logits_backward(hidden.view(), upstream.view(), &mut gradients)
                .unwrap()
        });
    });
    group.bench_function("loss, forward and backward", |b| {
        let (labels, options) = (labels(), CrossEntropyOptions::default());
        b.iter(|| layer.cross_entropy(hidden.view(), &labels, options).unwrap());
    });
    group.bench_function("merge and unmerge", |b| {
        b.iter(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        });
    });
}

fn candle_head(criterion: &mut Criterion) {
    let shape = (WORKLOAD.vocab_size, WORKLOAD.dim);
    let table = Tensor::from_vec(WORKLOAD.table::<f32>(), shape, &Device::Cpu).unwrap();
    let hidden = Tensor::from_vec(hidden(), (HIDDEN, WORKLOAD.dim), &Device::Cpu).unwrap();
    let hidden = Var::from_tensor(&hidden).unwrap();
    let transposed = table.t().unwrap();
    let mut layer = candle::TrainableTokens::with_rows(table, &WORKLOAD.trained_ids(), &rows()).unwrap();
    let head = layer.tied_head();
    let mut group = quick(criterion, "head/candle");
    group.bench_function("frozen", |b| b.iter(|| hidden.matmul(&transposed).unwrap()));
    group.bench_function("trained", |b| b.iter(|| head.forward(&hidden).unwrap()));
    group.bench_function("trained, forward and backward", |b| {
        b.iter(|| head.forward(&hidden).unwrap().backward().unwrap());
    });
    group.bench_function("loss, forward and backward", |b| {
        let labels = Tensor::from_vec(labels(), HIDDEN, &Device::Cpu).unwrap();
        let options = CrossEntropyOptions::default();
        let loss = || head.cross_entropy(&hidden, &labels, options).unwrap();
        b.iter(|| loss().backward().unwrap());
    });
    group.bench_function("merge and unmerge", |b| {
        b.iter(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        });
    });
}

fn burn_head(criterion: &mut Criterion) {
    let device = BurnDevice::flex().autodiff();
    let data = TensorData::new(WORKLOAD.table::<f32>(), [WORKLOAD.vocab_size, WORKLOAD.dim]);
    let weight = BurnTensor::<2>::from_data(data, &device);
    let hidden = TensorData::new(hidden(), [HIDDEN, WORKLOAD.dim]);
    let hidden = BurnTensor::<2>::from_data(hidden, &device).require_grad();
    let mut group = quick(criterion, "head/burn");
    {
        let (hidden, weight) = (hidden.clone().detach(), weight.clone());
        group.bench_function("frozen", |b| {
            b.iter(|| hidden.clone().matmul(weight.clone().transpose()));
        });
    }
    let embedding = ::burn::nn::Embedding {
        weight: Param::from_tensor(weight).set_require_grad(false),
    };
    let ids = WORKLOAD.trained_ids();
    let mut layer = on_burn::TrainableTokens::with_rows(embedding, &ids, &rows()).unwrap();
    group.bench_function("trained", |b| {
        b.iter(|| layer.tied_head().forward(hidden.clone()));
    });
    group.bench_function("trained, forward and backward", |b| {
        b.iter(|| on_burn::backward(&layer.tied_head().forward(hidden.clone()).sum()).unwrap());
    });
    group.bench_function("loss, forward and backward", |b| {
        let labels = BurnTensor::<1, Int>::from_data(TensorData::new(labels(), [HIDDEN]), &device);
        let options = CrossEntropyOptions::default();
        let head = layer.tied_head();
        let loss = || {
            head.cross_entropy(hidden.clone(), labels.clone(), options)
                .unwrap()
        };
        b.iter(|| on_burn::backward(&loss()).unwrap());
    });
    group.bench_function("merge and unmerge", |b| {
        b.iter(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        });
    });
}

fn dfdx_head(criterion: &mut Criterion) {
    let device = Cpu::default();
    let shape = (WORKLOAD.vocab_size, WORKLOAD.dim);
    let weight: DfdxTensor<(usize, usize), f32, Cpu> = device.tensor_from_vec(WORKLOAD.table(), shape);
    let hidden: DfdxTensor<(usize, usize), f32, Cpu> =
        device.tensor_from_vec(hidden(), (HIDDEN, WORKLOAD.dim));
    let mut group = quick(criterion, "head/dfdx");
    {
        let transposed = weight.clone().permute::<(usize, usize), Axes2<1, 0>>();
        group.bench_function("frozen", |b| {
            b.iter(|| hidden.clone().matmul(transposed.clone()));
        });
    }
    let ids = WORKLOAD.trained_ids();
    let mut layer = on_dfdx::TrainableTokens::with_rows(weight, &ids, &rows()).unwrap();
    group.bench_function("trained", |b| {
        b.iter(|| layer.tied_head().logits(hidden.clone()).unwrap());
    });
    group.bench_function("trained, forward and backward", |b| {
        b.iter(|| {
            let traced = hidden.leaky_trace();
            layer
                .tied_head()
                .logits(traced)
                .unwrap()
                .sum::<(), _>()
                .backward()
        });
    });
    group.bench_function("merge and unmerge", |b| {
        b.iter(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        });
    });
}

criterion_group!(benches, ndarray_head, candle_head, burn_head, dfdx_head);
criterion_main!(benches);

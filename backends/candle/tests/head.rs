//! The tied head, case by case.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use common::{DTYPES, assert_close, bytes, noise, values};
use trainable_tokens_candle::{Candle, TrainableTokens};
use trainable_tokens_core::{
    Backend, BackendError, ErrorKind, LayerOptions, LookupPlan, RowTransform, Sgd, SgdConfig, TokenSet,
};

fn layer(dtype: DType) -> TrainableTokens {
    TrainableTokens::from_tensor(noise(&[10, 4], dtype, 1), &[7, 2]).unwrap()
}

fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

#[test]
fn head_and_lookup_share_rows_gradient_and_merges() {
    let table = noise(&[10, 4], DType::F32, 1);
    let mut layer = TrainableTokens::from_tensor(table.clone(), &[7, 2]).unwrap();
    let head = layer.tied_head();
    let hidden = noise(&[1, 2, 4], DType::F32, 3);
    let frozen = head.forward(&hidden).unwrap();
    assert_eq!(frozen.dims(), [1, 2, 10]);

    let logits = head.forward(&layer.forward(&ids(&[7, 1, 2])).unwrap()).unwrap();
    let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let mut sgd = Sgd::new(SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    })
    .unwrap();
    layer.step(&gradients, &mut sgd, &mut []).unwrap();
    let live = head.forward(&hidden).unwrap();
    assert_ne!(bytes(&live), bytes(&frozen));

    layer.merge().unwrap();
    assert_eq!(layer.merge().unwrap_err().kind(), ErrorKind::State);
    let merged = head.forward(&hidden).unwrap();
    assert_close("merged", &values(&merged), &values(&live), 1e-6);
    let loss = head
        .forward(&layer.forward(&ids(&[7])).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    assert_eq!(
        layer.gradient(&loss.backward().unwrap()).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
    layer.unmerge().unwrap();
    assert_eq!(bytes(&head.forward(&hidden).unwrap()), bytes(&live));
    assert_eq!(layer.unmerge().unwrap_err().kind(), ErrorKind::State);
}

#[test]
fn a_heads_bias_is_kept_and_stays_frozen() {
    for dtype in DTYPES {
        let layer = layer(dtype);
        let bias = Var::from_tensor(&noise(&[10], dtype, 9)).unwrap();
        let head = layer.tied_head();
        let hidden = noise(&[3, 4], dtype, 3);
        let want = head
            .forward(&hidden)
            .unwrap()
            .broadcast_add(&bias.as_detached_tensor())
            .unwrap();
        let head = head.with_bias(&bias).unwrap();
        let got = head.forward(&hidden).unwrap();
        assert_eq!(bytes(&got), bytes(&want));
        assert!(got.sum_all().unwrap().backward().unwrap().get(&bias).is_none());
        assert!(head.clone().with_bias(&noise(&[9], dtype, 9)).is_err());
    }
}

#[test]
fn hidden_states_of_any_shape_and_layout() {
    let layer = layer(DType::F32);
    let head = layer.tied_head();
    assert_eq!(head.vocab_size(), 10);
    let hidden = Var::from_tensor(&noise(&[4, 6], DType::F32, 3)).unwrap();
    let strided = hidden.t().unwrap();
    let want = head.forward(&strided.contiguous().unwrap()).unwrap();
    let got = head.forward(&strided).unwrap();
    assert_eq!(bytes(&got), bytes(&want));
    let deep = strided.reshape((1, 2, 3, 4)).unwrap();
    assert_eq!(head.forward(&deep).unwrap().dims(), [1, 2, 3, 10]);
    assert_eq!(head.forward(&strided.get(0).unwrap()).unwrap().dims(), [10]);
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    let logits = head.forward(&empty).unwrap();
    assert_eq!(logits.dims(), [0, 10]);
    let gradient = layer
        .gradient(&logits.sum_all().unwrap().backward().unwrap())
        .unwrap();
    assert_eq!(gradient.to_f64_vec(), [0.0; 8]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let layer = layer(DType::F32);
    let head = layer.tied_head();
    let kind = |hidden: &Tensor| head.logits(hidden).unwrap_err().kind();
    assert_eq!(kind(&noise(&[2, 5], DType::F32, 1)), ErrorKind::Shape);
    assert_eq!(kind(&noise(&[], DType::F32, 1)), ErrorKind::Shape);
    assert_eq!(kind(&noise(&[2, 4], DType::BF16, 1)), ErrorKind::DType);

    // Through the backend's own functions: tokens of another table or of other rows.
    let (table, layer) = (layer.table(), layer.layer());
    let (table, delta) = (&*table, layer.delta().unwrap());
    for (tokens, vocab) in [(&[7, 2][..], 11), (&[7], 10)] {
        let tokens = TokenSet::new(tokens.iter().copied(), vocab).unwrap();
        let hidden = noise(&[2, 4], DType::F32, 1);
        let error = Candle::logits(hidden, table, Some(delta), &tokens).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shape);
    }
    let larger = TokenSet::new([7, 2], 20).unwrap();
    let plan = LookupPlan::new(&larger, LayerOptions::default(), &[15]).unwrap();
    let error = Candle::lookup(table, Some(delta), &plan, RowTransform::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
    let more = TokenSet::new([7, 2, 3], 10).unwrap();
    let plan = LookupPlan::new(&more, LayerOptions::default(), &[3]).unwrap();
    let error = Candle::lookup(table, Some(delta), &plan, RowTransform::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

#[test]
fn layer_and_head_cross_threads() {
    fn both<T: Send + Sync>(_: &T) {}
    let layer = layer(DType::F32);
    both(&layer);
    both(&layer.tied_head());
}

#[test]
fn long_rows_and_large_tables_are_a_no_op_to_the_last_bit() {
    // Products of other shapes sum such rows in another order.
    for dtype in DTYPES {
        for (vocab, dim) in [(100, 1_300), (1_210, 1_300), (5_000, 64)] {
            let table = noise(&[vocab, dim], dtype, 1);
            let layer = TrainableTokens::from_tensor(table.clone(), &[7, 2, 99]).unwrap();
            for rows in [1, 5, 70] {
                let hidden = noise(&[rows, dim], dtype, 2);
                let got = layer.tied_head().forward(&hidden).unwrap();
                let want = hidden.matmul(&table.t().unwrap()).unwrap();
                assert!(
                    bytes(&got) == bytes(&want),
                    "{dtype:?} {vocab} x {dim}, {rows} rows"
                );
            }
        }
    }
}

//! The tied head, case by case.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::module::Module;
use burn::tensor::{DType, Tensor};
use common::{DTYPES, assert_close, bytes, embedding, ids, noise, values};
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{BackendError, ErrorKind, Sgd, SgdConfig};

fn layer(dtype: DType) -> TrainableTokens {
    TrainableTokens::wrap(embedding(10, 4, dtype), &[7, 2]).unwrap()
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-6,
        DType::F16 => 2e-3,
        _ => 2e-2,
    }
}

#[test]
fn untrained_rows_are_a_no_op_to_the_bit() {
    for dtype in DTYPES {
        for (vocab_size, num_ids) in [(10, 1), (10, 3), (133, 5), (1030, 70)] {
            let weight = noise([vocab_size, 64], dtype, 5);
            let plain = burn::nn::Embedding {
                weight: burn::module::Param::from_tensor(weight.clone()),
            };
            let layer = TrainableTokens::wrap(plain, &[9, 0, 4]).unwrap();
            let hidden = noise([num_ids, 64], dtype, 3);
            let got = layer.tied_head().forward(hidden.clone());
            let want = hidden.clone().matmul(weight.transpose());
            let name = format!("{dtype:?} {vocab_size} {num_ids}");
            if dtype == DType::BF16 {
                // Flex computes it in blocks: the bits are those of the frozen head, which does the same.
                let frozen = TrainableTokens::wrap(layer.embedding().clone(), &[]).unwrap();
                assert_eq!(bytes(&got), bytes(&frozen.tied_head().forward(hidden)), "{name}");
                assert_close(&name, &values(&got), &values(&want), tolerance(dtype));
            } else {
                assert_eq!(bytes(&got), bytes(&want), "{name}");
            }
        }
    }
}

#[test]
fn head_and_lookup_share_rows_gradient_and_merges() {
    let mut layer = layer(DType::F32);
    let hidden = noise([1, 2, 4], DType::F32, 3);
    let frozen = layer.tied_head().forward(hidden.clone());
    assert_eq!(frozen.dims(), [1, 2, 10]);

    let logits = layer.tied_head().forward(layer.forward(ids(&[7, 1, 2])));
    let gradients = backward(&logits.square().sum()).unwrap();
    let config = SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    };
    layer
        .step(&gradients, &mut Sgd::new(config).unwrap(), &mut [])
        .unwrap();
    let live = layer.tied_head().forward(hidden.clone());
    assert_ne!(bytes(&live), bytes(&frozen));

    layer.merge().unwrap();
    let merged = layer.tied_head().forward(hidden.clone());
    assert_close("merged", &values(&merged), &values(&live), 1e-6);
    let loss = layer.tied_head().forward(layer.forward(ids(&[7]))).sum();
    assert_eq!(backward(&loss).err().unwrap().kind(), ErrorKind::NoGradient);
    layer.unmerge().unwrap();
    assert_eq!(bytes(&layer.tied_head().forward(hidden)), bytes(&live));
}

#[test]
fn gradients_are_those_of_a_table_that_was_written() {
    for dtype in DTYPES {
        let mut layer = TrainableTokens::wrap(embedding(600, 8, dtype), &[599, 2, 300]).unwrap();
        let rows = noise([3, 8], DType::F32, 11);
        let rows =
            trainable_tokens_core::TokenRows::new(rows.into_data().try_into_vec::<f32>().unwrap(), 3, 8);
        layer.set_rows(&rows.unwrap()).unwrap();
        let hidden = noise([5, 8], dtype, 3).require_grad();
        let upstream = noise([5, 600], dtype, 4);
        let logits = layer.tied_head().forward(hidden.clone());
        let gradients = backward(&(logits * upstream.clone()).sum()).unwrap();
        let got = layer.gradient(&gradients).unwrap();

        layer.merge().unwrap();
        let wide = |tensor: Tensor<2>| tensor.detach().cast(DType::F64);
        let table = wide(layer.embedding().weight.val());
        let (upstream, states) = (wide(upstream), wide(hidden.clone()));
        let want = values(&upstream.clone().matmul(table));
        let name = format!("hidden states, {dtype:?}");
        let gradient = hidden.grad(&gradients).unwrap();
        assert_close(&name, &values(&gradient), &want, tolerance(dtype));

        let columns = Tensor::from_data([599, 2, 300], &upstream.device());
        let want = values(&upstream.select(1, columns).transpose().matmul(states));
        let name = format!("rows, {dtype:?}");
        assert_close(&name, &got.to_f64_vec(), &want, tolerance(dtype).min(1e-6));
    }
}

#[test]
fn a_bias_is_kept_and_stays_frozen() {
    for dtype in DTYPES {
        let layer = layer(dtype);
        let bias = noise([10], dtype, 9).require_grad();
        let hidden = noise([3, 4], dtype, 3);
        let want = layer.tied_head().forward(hidden.clone()) + bias.clone().detach().unsqueeze();
        let head = layer.tied_head().with_bias(bias.clone()).unwrap();
        let got = head.forward(hidden);
        assert_eq!(bytes(&got), bytes(&want));
        assert!(bias.grad(&backward(&got.sum()).unwrap()).is_none());
        assert!(head.with_bias(noise([9], dtype, 9)).is_err());
    }
}

#[test]
fn hidden_states_that_do_not_fit_are_refused() {
    let layer = layer(DType::F32);
    let kind = |hidden: Tensor<2>| layer.tied_head().logits(hidden).unwrap_err().kind();
    assert_eq!(kind(noise([2, 5], DType::F32, 1)), ErrorKind::Shape);
    assert_eq!(kind(noise([2, 4], DType::F64, 1)), ErrorKind::DType);
    let bias = layer.tied_head().with_bias(noise([10], DType::BF16, 1));
    assert_eq!(bias.unwrap_err().kind(), ErrorKind::DType);
}

#[test]
fn no_hidden_states_and_no_autodiff() {
    for dtype in DTYPES {
        let layer = layer(dtype);
        assert_eq!(layer.tied_head().forward(noise([0, 4], dtype, 1)).dims(), [0, 10]);
        let hidden = noise([2, 4], dtype, 1);
        let want = bytes(&layer.tied_head().forward(hidden.clone()));
        let got = layer.valid();
        let got = got.tied_head().forward(hidden.inner());
        assert!(!got.is_autodiff());
        assert_eq!(bytes(&got), want);
    }
}

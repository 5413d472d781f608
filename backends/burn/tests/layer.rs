//! The module's behaviour, case by case.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::config::Config;
use burn::module::{Initializer, Module};
use burn::nn::{Embedding, Linear};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use common::{DTYPES, bytes, device, embedding, ids, linear, noise, rows, values};
use trainable_tokens_burn::{TrainableTokens, TrainableTokensConfig, backward};
use trainable_tokens_core::{
    BackendError, EmbedScale, ErrorKind, LayerOptions, MaxNorm, Padding, PaddingRule, Sgd, SgdConfig,
    TokenId, TokenRows,
};

fn layer(dtype: DType) -> TrainableTokens {
    TrainableTokens::wrap(embedding(10, 4, dtype), &[7, 2]).unwrap()
}

fn sgd(lr: f64) -> Sgd {
    let config = SgdConfig {
        lr,
        ..SgdConfig::default()
    };
    Sgd::new(config).unwrap()
}

#[test]
fn a_wrapped_embedding_is_the_embedding_bit_for_bit() {
    let batch = Tensor::<2, Int>::from_data([[7, 1, 2], [0, 9, 7]], &device());
    for dtype in DTYPES {
        let plain = embedding(10, 4, dtype);
        let layer = TrainableTokens::wrap(plain.clone(), &[7, 2]).unwrap();
        let (got, want) = (layer.forward(batch.clone()), plain.forward(batch.clone()));
        assert_eq!((got.dims(), got.dtype()), ([2, 3, 4], dtype));
        assert_eq!(bytes(&got), bytes(&want), "{dtype:?}");
        let got = layer.valid().forward(batch.clone());
        assert!(!got.is_autodiff());
        assert_eq!(bytes(&got), bytes(&want), "{dtype:?} without autodiff");
        assert_eq!(bytes(&layer.into_embedding().weight), bytes(&plain.weight));
    }
}

#[test]
fn ids_of_any_integer_type_and_shape() {
    let layer = layer(DType::F32);
    let batch = TensorData::from([[7i64, 1, 2], [0, 9, 7]]);
    let want = bytes(&layer.forward(Tensor::from_data(batch.clone(), &device())));
    for dtype in [DType::U8, DType::U64, DType::I16, DType::I32, DType::I64] {
        let batch = Tensor::<2, Int>::from_data(batch.clone(), (&device(), dtype));
        assert_eq!(bytes(&layer.forward(batch.clone())), want, "{dtype:?}");
        let turned: Tensor<3> = layer.forward(batch.transpose());
        assert_eq!(bytes(&turned.swap_dims(0, 1)), want, "{dtype:?}");
    }
    assert_eq!(layer.forward(ids(&[])).dims(), [1, 0, 4]);
}

#[test]
fn ids_that_name_no_row_are_refused() {
    let layer = layer(DType::F32);
    for (id, text) in [
        (-1, "token id -1 is"),
        (10, "token id 10 is"),
        (1 << 40, "token id 1099511627776 is"),
    ] {
        let error = layer.lookup(ids(&[3, id])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
        assert!(error.to_string().contains(text), "{error}");
    }
    let largest = TensorData::from([[u64::MAX]]);
    let error = layer.lookup(Tensor::from_data(largest, (&device(), DType::U64)));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::TokenOutOfRange);
    let error = layer.plan(&[u32::MAX]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
}

#[test]
#[should_panic(expected = "token id 10 is outside the vocabulary of 10 rows")]
fn forward_panics_as_burns_layers_do() {
    layer(DType::F32).forward(ids(&[10]));
}

#[test]
fn tables_and_tokens_that_do_not_fit_are_refused() {
    let kind = |ids: &[u32]| {
        TrainableTokens::wrap(embedding(10, 4, DType::F32), ids)
            .unwrap_err()
            .kind()
    };
    assert_eq!(kind(&[10]), ErrorKind::TokenOutOfRange);
    assert_eq!(kind(&[1, 1]), ErrorKind::DuplicateToken);
    let table = embedding(10, 4, DType::F32);
    let error = TrainableTokens::with_rows(table, &[1, 2], &rows(0f32, 1, 4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
    let config = TrainableTokensConfig::new(10, 4, vec![3, 3]);
    assert_eq!(
        config.init(&device()).unwrap_err().kind(),
        ErrorKind::DuplicateToken
    );
}

#[test]
fn a_configuration_makes_the_layer_and_survives_a_file() {
    let config = TrainableTokensConfig::new(10, 4, vec![7, 2]);
    let config = TrainableTokensConfig::load_binary(config.to_string().as_bytes()).unwrap();
    let layer = config.init(&device()).unwrap();
    assert_eq!(layer.tokens().unwrap().to_vec(), [7, 2]);
    let batch = ids(&[1, 7, 2]);
    let want = layer.embedding().forward(batch.clone());
    assert_eq!(bytes(&layer.forward(batch)), bytes(&want));
}

#[test]
fn no_trainable_token_is_the_frozen_embedding() {
    for dtype in DTYPES {
        let plain = embedding(10, 4, dtype);
        let mut layer = TrainableTokens::wrap(plain.clone(), &[]).unwrap();
        let batch = ids(&[1, 7]);
        let want = bytes(&plain.forward(batch.clone()));
        assert_eq!(bytes(&layer.forward(batch.clone())), want);
        layer.merge().unwrap();
        assert_eq!(bytes(&layer.valid().forward(batch)), want);
        layer.unmerge().unwrap();
        let record = layer.clone().into_record().into_bytes().unwrap();
        let record = burn::store::ModuleRecord::from_bytes(record).unwrap();
        assert!(layer.try_load_record(record).unwrap().rows().unwrap().num_rows() == 0);
    }
}

#[test]
fn a_batch_without_trainable_tokens_has_a_zero_gradient() {
    for dtype in DTYPES {
        let layer = layer(dtype);
        for batch in [&[1, 3][..], &[]] {
            let loss = layer.forward(ids(batch)).sum();
            let gradient = layer.gradient(&backward(&loss).unwrap()).unwrap();
            assert!(
                gradient.bits_eq(&TokenRows::zeros(gradient.dtype(), 2, 4)),
                "{dtype:?}"
            );
        }
    }
}

#[test]
fn a_batch_without_trainable_tokens_keeps_infinite_rows_out() {
    let mut layer = layer(DType::F32);
    layer.set_rows(&rows(f32::INFINITY, 2, 4)).unwrap();
    let out = layer.forward(ids(&[1, 3]));
    assert_eq!(bytes(&out), bytes(&layer.embedding().forward(ids(&[1, 3]))));
    let gradient = layer.gradient(&backward(&out.sum()).unwrap()).unwrap();
    assert!(gradient.bits_eq(&TokenRows::zeros(gradient.dtype(), 2, 4)));
}

#[test]
fn a_loss_in_no_graph_is_an_error() {
    let mut layer = layer(DType::F32);
    let cut = layer.forward(ids(&[7])).detach().sum();
    assert_eq!(backward(&cut).err().unwrap().kind(), ErrorKind::NoGradient);
    let plain = layer.valid().forward(ids(&[7])).sum();
    assert_eq!(backward(&plain).err().unwrap().kind(), ErrorKind::NoGradient);

    let other = noise([4], DType::F32, 3).require_grad();
    let gradients = backward(&(cut * other.sum())).unwrap();
    let error = layer.step(&gradients, &mut sgd(0.1), &mut []).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);

    layer.merge().unwrap();
    let merged = layer.forward(ids(&[7])).sum();
    assert_eq!(backward(&merged).err().unwrap().kind(), ErrorKind::NoGradient);
}

#[test]
fn transforms_keep_the_bits_of_special_values_and_pass_gradients() {
    let special = [f64::INFINITY, f64::NEG_INFINITY, -0.0, 1e-40, f64::NAN];
    for (scale, limit) in [(-2.5, None), (0.5, Some(0.7)), (0.0, None), (1.0, Some(1e9))] {
        for dtype in DTYPES {
            let options = LayerOptions {
                scale: Some(EmbedScale::Exact(scale)),
                max_norm: limit.map(|limit| MaxNorm::new(limit).unwrap()),
                scale_grad_by_freq: true,
                ..LayerOptions::default()
            };
            let trained = TokenRows::new(special.to_vec(), 5, 1).unwrap();
            let table = embedding(10, 1, dtype);
            let layer = TrainableTokens::with_rows(table, &[5, 6, 7, 8, 9], &trained).unwrap();
            let mut layer = layer.with_options(options);
            let batch = ids(&[5, 6, 7, 8, 9, 0, 5]);
            let out = layer.forward(batch.clone());
            let gradient = layer.gradient(&backward(&out.clone().sum()).unwrap()).unwrap();
            layer.merge().unwrap();
            assert_eq!(
                bytes(&out),
                bytes(&layer.forward(batch)),
                "{dtype:?} {scale} {limit:?}"
            );
            assert_eq!(gradient.to_f64_vec(), [scale; 5], "{dtype:?} {limit:?}");
        }
    }
}

#[test]
fn a_padding_token_follows_its_rule() {
    for (rule, want) in [(PaddingRule::NoLookupGradient, 0.0), (PaddingRule::Train, 2.0)] {
        let padding = Some(Padding {
            token: TokenId(7),
            rule,
        });
        let layer = layer(DType::F32).with_options(LayerOptions {
            padding,
            ..LayerOptions::default()
        });
        let loss = layer.forward(ids(&[7, 2, 7])).sum();
        let gradient = layer.gradient(&backward(&loss).unwrap()).unwrap();
        assert_eq!(gradient.to_f64_vec(), [[want; 4], [1.0; 4]].concat());
    }
}

#[test]
fn the_table_gets_no_gradient_even_if_all_is_unfrozen() {
    let layer = layer(DType::F32).unfreeze().valid().train();
    assert!(layer.embedding().weight.is_require_grad());
    let hidden = layer.forward(ids(&[7, 1]));
    let gradients = backward(&layer.tied_head().forward(hidden).sum()).unwrap();
    assert!(layer.embedding().weight.val().grad(&gradients).is_none());
    assert!(layer.delta().unwrap().val().grad(&gradients).is_some());
}

#[derive(Module, Debug)]
struct Model {
    embed: TrainableTokens,
    head: Linear,
}

impl Model {
    fn new(dtype: DType) -> Self {
        let embed = layer(dtype);
        let head = linear(4, 3);
        Self { embed, head }
    }

    fn loss(&self) -> Tensor<1> {
        let hidden = self.embed.forward(ids(&[7, 1, 2, 7])).cast(DType::F32);
        (self.head.forward(hidden) - 0.5).square().mean()
    }
}

#[test]
fn burns_own_optimizer_trains_the_rows_alone() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut model = Model::new(dtype);
        assert_eq!(model.num_params(), 10 * 4 + 2 * 4 + 4 * 3);
        let before = model.clone();
        let mut adam = AdamWConfig::new().with_weight_decay(0.1).init();
        for _ in 0..20 {
            let gradients = GradientsParams::from_grads(backward(&model.loss()).unwrap(), &model);
            assert_eq!(gradients.len(), 1);
            model = adam.step(0.05, model, gradients);
        }
        let loss = |model: &Model| model.loss().into_scalar::<f32>();
        assert!(loss(&model) < 0.7 * loss(&before), "{dtype:?}");
        let weight = |model: &Model| bytes(&model.embed.embedding().weight);
        assert_eq!(weight(&model), weight(&before));
        assert_eq!(model.embed.delta().unwrap().id, before.embed.delta().unwrap().id);
    }
}

#[test]
fn an_optimizer_of_core_trains_the_rows_alone() {
    for dtype in DTYPES {
        let mut model = Model::new(dtype);
        let before = model.clone();
        for _ in 0..20 {
            let gradients = backward(&model.loss()).unwrap();
            model.embed.step(&gradients, &mut sgd(0.5), &mut []).unwrap();
        }
        let loss = |model: &Model| model.loss().into_scalar::<f32>();
        assert!(loss(&model) < 0.7 * loss(&before), "{dtype:?}");
        let weight = |model: &Model| bytes(&model.embed.embedding().weight);
        assert_eq!(weight(&model), weight(&before));
        assert!(model.embed.delta().unwrap().is_require_grad());
    }
}

#[test]
fn merged_and_restored_to_the_bit() {
    for dtype in DTYPES {
        let plain = embedding(10, 4, dtype);
        let mut layer = TrainableTokens::wrap(plain.clone(), &[7, 2]).unwrap();
        layer.set_rows(&rows(0.3f64, 2, 4)).unwrap();
        let batch = ids(&[7, 1, 2]);
        let want = bytes(&layer.forward(batch.clone()));
        layer.merge().unwrap();
        assert!(layer.is_merged());
        assert_eq!(layer.merge().unwrap_err().kind(), ErrorKind::State);
        assert_eq!(
            layer.set_rows(&rows(0.0, 2, 4)).unwrap_err().kind(),
            ErrorKind::State
        );
        assert_eq!(bytes(&layer.forward(batch.clone())), want);
        assert_eq!(
            bytes(&layer.clone().into_embedding().forward(batch.clone())),
            want
        );
        // The embedding that it was made from has its rows still: burn's tensors are values.
        assert_ne!(bytes(&plain.forward(batch)), want);
        layer.unmerge().unwrap();
        assert_eq!(layer.unmerge().unwrap_err().kind(), ErrorKind::State);
        assert_eq!(bytes(&layer.embedding().weight), bytes(&plain.weight));
    }
}

#[test]
fn checkpointing_changes_no_gradient() {
    let gradients = [device(), device().gradient_checkpointing()].map(|device| {
        let config = TrainableTokensConfig::new(10, 4, vec![7, 2]).with_initializer(Initializer::Ones);
        let layer = config.init(&device).unwrap().with_options(LayerOptions {
            scale: Some(EmbedScale::Exact(1.5)),
            ..LayerOptions::default()
        });
        let ids = |ids: [[i32; 4]; 1]| Tensor::from_data(ids, &device);
        let rows = layer.forward(ids([[7, 1, 2, 7]])) + layer.forward(ids([[0, 1, 3, 0]]));
        let loss = layer.tied_head().forward(rows).exp().sum();
        layer.gradient(&backward(&loss).unwrap()).unwrap()
    });
    assert!(gradients[0].bits_eq(&gradients[1]));
    assert!(gradients[0].to_f64_vec().iter().all(|x| *x != 0.0));
}

#[test]
fn the_layer_moves_between_training_and_validation() {
    let layer = layer(DType::F32);
    let back = layer.valid().train().fork(&Device::flex());
    let loss = back.forward(ids(&[7])).sum();
    let gradient = back.gradient(&backward(&loss).unwrap()).unwrap();
    assert_eq!(gradient.to_f64_vec(), [[1.0; 4], [0.0; 4]].concat());
    assert!(!back.embedding().weight.is_require_grad());
}

#[test]
fn a_reparameterized_embedding_is_wrapped_as_it_acts() {
    let plain: Embedding = embedding(10, 4, DType::F32).apply_lora(burn::module::Lora::new(2, 4.0));
    let layer = TrainableTokens::wrap(plain.clone(), &[7]).unwrap();
    assert_eq!(
        values(&layer.forward(ids(&[7, 1]))),
        values(&plain.forward(ids(&[7, 1])))
    );
}

//! What records hold.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::module::Module;
use burn::nn::Linear;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::DType;
use common::{DTYPES, bytes, device, embedding, ids, linear, rows};
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{BackendError, ErrorKind};

fn layer(dtype: DType, tokens: &[u32]) -> TrainableTokens {
    TrainableTokens::wrap(embedding(10, 4, dtype), tokens).unwrap()
}

fn trained(dtype: DType, value: f64) -> TrainableTokens {
    let mut layer = layer(dtype, &[7, 2]);
    layer.set_rows(&rows(value, 2, 4)).unwrap();
    layer
}

fn record<M: Module>(module: M) -> ModuleRecord {
    ModuleRecord::from_bytes(module.into_record().into_bytes().unwrap()).unwrap()
}

#[test]
fn a_record_brings_the_rows_and_their_tokens() {
    let batch = ids(&[7, 1, 2, 5]);
    for dtype in DTYPES {
        let layer = trained(dtype, 0.3);
        let want = bytes(&layer.forward(batch.clone()));
        // Written for other tokens, and used before the record came.
        let other = self::layer(dtype, &[5, 0]);
        other.forward(batch.clone());
        let kept = other.clone();
        let loaded = other.load_record(record(layer));
        assert_eq!(loaded.tokens().unwrap().to_vec(), [7, 2]);
        assert_eq!(bytes(&loaded.forward(batch.clone())), want, "{dtype:?}");
        assert_eq!(kept.tokens().unwrap().to_vec(), [5, 0]);
        let loss = loaded.forward(batch.clone()).sum();
        let gradient = loaded.gradient(&backward(&loss).unwrap()).unwrap();
        assert_eq!(gradient.to_f64_vec(), [1.0; 8]);
        assert!(!loaded.embedding().weight.is_require_grad());
    }
}

#[test]
fn the_rows_alone_are_a_record() {
    let layer = trained(DType::BF16, 0.3);
    let group = layer.row_params();
    let bytes_of = |record: ModuleRecord| record.into_bytes().unwrap();
    let record = ModuleRecord::from_bytes(bytes_of(layer.clone().into_record_group(group))).unwrap();
    assert_eq!(record.len(), 2);
    let loaded = self::layer(DType::BF16, &[5, 0]).load_record(record.allow_partial(true));
    let batch = ids(&[7, 1, 2, 5]);
    assert_eq!(
        bytes(&loaded.forward(batch.clone())),
        bytes(&layer.forward(batch))
    );
}

#[test]
fn a_record_of_another_number_of_tokens_is_refused() {
    let error = layer(DType::F32, &[1]).try_load_record(record(trained(DType::F32, 0.3)));
    assert!(error.unwrap_err().to_string().contains("shape mismatch"));
}

#[test]
fn a_record_with_bad_tokens_is_an_error_and_not_a_panic() {
    #[derive(Module, Debug)]
    struct Ids {
        ids: burn::module::Param<burn::tensor::Tensor<1, burn::tensor::Int>>,
    }
    #[derive(Module, Debug)]
    struct Forged {
        adapters: Vec<Ids>,
    }
    for (tokens, kind) in [
        ([7, 10], ErrorKind::TokenOutOfRange),
        ([-1, 2], ErrorKind::TokenOutOfRange),
        ([3, 3], ErrorKind::DuplicateToken),
    ] {
        let ids = burn::tensor::Tensor::from_data(tokens, &device());
        let ids = burn::module::Param::initialized(burn::module::ParamId::new(), ids);
        let adapters = vec![Ids { ids }];
        let forged = record(Forged { adapters }).allow_partial(true);
        let loaded = trained(DType::F32, 0.3).load_record(forged);
        assert_eq!(loaded.tokens().unwrap_err().kind(), kind);
        assert_eq!(loaded.lookup(common::ids(&[7])).unwrap_err().kind(), kind);
    }
}

#[test]
fn merged_and_unmerged_records_are_not_confused() {
    let plain = embedding(10, 4, DType::F32);
    let mut merged = trained(DType::F32, 0.3);
    merged.merge().unwrap();
    let refused = |layer: TrainableTokens, record| layer.try_load_record(record).unwrap_err().to_string();
    assert!(refused(merged.clone(), record(trained(DType::F32, 0.5))).contains("Missing"));
    assert!(refused(trained(DType::F32, 0.5), record(merged.clone())).contains("Unused"));

    let mut other = trained(DType::F32, 0.5);
    other.merge().unwrap();
    let mut loaded = other.load_record(record(merged.clone()));
    let batch = ids(&[7, 1, 2]);
    assert_eq!(
        bytes(&loaded.forward(batch.clone())),
        bytes(&merged.forward(batch))
    );
    loaded.unmerge().unwrap();
    assert_eq!(bytes(&loaded.embedding().weight), bytes(&plain.weight));
}

#[derive(Module, Debug)]
struct Model {
    embed: TrainableTokens,
    head: Linear,
}

impl Model {
    fn step(self, adam: &mut burn::optim::ModuleOptimizer) -> Self {
        let hidden = self.embed.forward(ids(&[7, 1, 2, 7]));
        let loss = (self.head.forward(hidden) - 0.5).square().mean();
        let gradients = GradientsParams::from_grads(backward(&loss).unwrap(), &self);
        adam.step(0.05, self, gradients)
    }
}

#[test]
fn training_with_burns_optimizer_resumes_bit_for_bit() {
    let head = linear(4, 3);
    let embed = layer(DType::F32, &[7, 2]);
    let new = Model { embed, head };
    let mut adam = AdamWConfig::new().init();
    let half = (0..5).fold(new.clone(), |model, _| model.step(&mut adam));
    let (saved, state) = (record(half.clone()), adam.clone().into_bytes().unwrap());
    let whole = (0..5).fold(half, |model, _| model.step(&mut adam));

    let mut adam = AdamWConfig::new().init().from_bytes(state).unwrap();
    let resumed = (0..5).fold(new.load_record(saved), |model, _| model.step(&mut adam));
    assert!(
        resumed
            .embed
            .rows()
            .unwrap()
            .bits_eq(&whole.embed.rows().unwrap())
    );
}

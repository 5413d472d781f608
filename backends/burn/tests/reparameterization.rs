//! Rows of a model whose code is not changed.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::module::Module;
use burn::nn::{Embedding, Linear};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Tensor};
use common::{DTYPES, bytes, embedding, ids, linear};
use trainable_tokens_burn::{TrainableRows, backward, train_rows};
use trainable_tokens_core::{BackendError, ErrorKind};

#[derive(Module, Debug)]
struct Model {
    embed: Embedding,
    head: Linear,
}

impl Model {
    fn new(dtype: DType) -> Self {
        let head = linear(4, 3);
        let embed = embedding(10, 4, dtype);
        Self { embed, head }
    }

    fn loss(&self) -> Tensor<1> {
        let hidden = self.embed.forward(ids(&[7, 1, 2, 7])).cast(DType::F32);
        (self.head.forward(hidden) - 0.5).square().mean()
    }

    fn rows(&self) -> &TrainableRows {
        self.embed.weight.reparameterization().unwrap()
    }
}

#[test]
fn an_unmodified_model_trains_its_rows_alone() {
    for dtype in DTYPES {
        let plain = Model::new(dtype);
        let mut model = train_rows(plain.clone(), "embed.weight", &[7, 2]).unwrap();
        let batch = ids(&[7, 1, 2]);
        assert_eq!(
            bytes(&model.embed.forward(batch.clone())),
            bytes(&plain.embed.forward(batch.clone()))
        );
        let mut adam = AdamWConfig::new().init();
        for _ in 0..20 {
            let gradients = GradientsParams::from_grads(backward(&model.loss()).unwrap(), &model);
            assert_eq!(gradients.len(), 1);
            model = adam.step(0.05, model, gradients);
        }
        let loss = |model: &Model| model.loss().into_scalar::<f32>();
        assert!(loss(&model) < 0.7 * loss(&plain), "{dtype:?}");
        assert_eq!(bytes(&model.embed.weight.base()), bytes(&plain.embed.weight));
        assert_eq!(model.rows().token_ids().unwrap(), [7, 2]);

        let rows = model.rows().rows().unwrap();
        let merged = model.valid().materialize();
        let (weight, base) = (bytes(&merged.embed.weight), bytes(&plain.embed.weight));
        let row = |table: &[u8], id: usize| table[id * weight.len() / 10..][..weight.len() / 10].to_vec();
        let trained = rows.to_dtype(match dtype {
            DType::F64 => trainable_tokens_core::DType::F64,
            DType::F16 => trainable_tokens_core::DType::F16,
            DType::BF16 => trainable_tokens_core::DType::BF16,
            _ => trainable_tokens_core::DType::F32,
        });
        let trained = trained.to_le_bytes();
        for id in 0..10 {
            let want = match id {
                7 => trained[..trained.len() / 2].to_vec(),
                2 => trained[trained.len() / 2..].to_vec(),
                _ => row(&base, id),
            };
            assert_eq!(row(&weight, id), want, "{dtype:?} row {id}");
        }
    }
}

#[test]
fn records_bring_rows_and_tokens() {
    let model = train_rows(Model::new(DType::F32), "embed.weight", &[7, 2]).unwrap();
    let other = train_rows(Model::new(DType::F32), "embed.weight", &[0, 1]).unwrap();
    let loaded = other.load_record(model.clone().into_record());
    assert_eq!(loaded.rows().token_ids().unwrap(), [7, 2]);
    assert!(
        loaded
            .rows()
            .rows()
            .unwrap()
            .bits_eq(&model.rows().rows().unwrap())
    );
}

#[test]
fn what_is_not_there_is_refused() {
    let kind = |path: &str, ids: &[u32]| train_rows(Model::new(DType::F32), path, ids).unwrap_err().kind();
    assert_eq!(kind("embed", &[1]), ErrorKind::Shape);
    assert_eq!(kind("head.wight", &[1]), ErrorKind::Shape);
    assert_eq!(kind("embed.weight", &[10]), ErrorKind::TokenOutOfRange);
    assert_eq!(kind("embed.weight", &[1, 1]), ErrorKind::DuplicateToken);
}

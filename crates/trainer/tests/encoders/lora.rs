//! Weights of LoRA in encoders: where they go, how they train, what is refused.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::json;
use trainable_tokens_core::PaddingRule;
use trainable_tokens_format::{Adapter, Checkpoint};
use trainable_tokens_trainer::{
    ALL_LINEAR, LanguageModel, LoraOptions, Objective, TeachLoss, TrainOptions, Trainer,
};

use crate::{
    RANKING, TOKENS, dataset, defined, expected, fixture, flat, labelled, lengths, masking, teach, unlabelled,
};

fn options(targets: &[&str]) -> LoraOptions {
    LoraOptions {
        rank: 2,
        alpha: 4.0,
        targets: targets.iter().map(|target| (*target).to_owned()).collect(),
        seed: 7,
        ..LoraOptions::default()
    }
}

fn start(name: &str, targets: &[&str]) -> Adapter {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    options(targets).start(&checkpoint, &TOKENS, None).unwrap()
}

fn with(name: &str, adapter: &Adapter) -> LanguageModel {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let padding = PaddingRule::NoLookupGradient;
    LanguageModel::load_adapter(&checkpoint, adapter, padding, DType::F32, &Device::Cpu).unwrap()
}

fn paths(adapter: &Adapter) -> Vec<String> {
    let weights = adapter.lora_weights().unwrap();
    weights.iter().map(|weights| weights.path().to_owned()).collect()
}

/// What the model computes of the fixture's batch.
fn outputs(name: &str, model: &LanguageModel) -> Vec<f32> {
    let want = expected(name);
    let (ids, lengths) = (&want["input_ids"], lengths(&want["lengths"]));
    let embeddings = model.embed(ids).unwrap().detach();
    let hidden = model.hidden(&embeddings, ids, Some(&lengths)).unwrap();
    if model.as_encoder().unwrap().has_head() {
        flat(&model.logits(&hidden).unwrap())
    } else {
        flat(&hidden)
    }
}

/// The modules that PEFT finds in a masked language model, and in a bare encoder but for its pooler, which no embedding
/// of a sentence comes from.
#[test]
fn all_linear_is_that_of_peft() {
    const LAYER: [&str; 6] = [
        "attention.output.dense",
        "attention.self.key",
        "attention.self.query",
        "attention.self.value",
        "intermediate.dense",
        "output.dense",
    ];
    for (name, prefix, head) in [
        ("bert", "bert.", Some("cls.predictions.transform.dense")),
        ("roberta", "roberta.", Some("lm_head.dense")),
        ("sentences", "", None),
    ] {
        let layers =
            (0..2).flat_map(|layer| LAYER.map(|module| format!("{prefix}encoder.layer.{layer}.{module}")));
        let mut want: Vec<String> = layers.chain(head.map(str::to_owned)).collect();
        want.sort();
        for targets in [&[ALL_LINEAR][..], &["query", "key", "value", "dense"]] {
            let start = start(name, targets);
            assert_eq!(paths(&start), want, "{name}: {targets:?}");
            let model = with(name, &start);
            assert_eq!(model.low_rank().len(), want.len());
            let plain = outputs(name, &crate::model(name));
            assert_eq!(outputs(name, &model), plain, "{name}: not a no-op");
        }
        let attention = start(name, &[]);
        let attention = paths(&attention);
        assert!(attention.len() == 4, "{attention:?}");
        assert!(
            attention
                .iter()
                .all(|path| path.ends_with("query") || path.ends_with("value"))
        );
    }
}

#[test]
fn what_cannot_train_is_refused_by_name() {
    for (name, targets, culprits) in [
        (
            "bert",
            &["query", "qeury"][..],
            &["'qeury'", "query, key, value"][..],
        ),
        (
            "bert",
            &["word_embeddings"],
            &["bert.embeddings.word_embeddings", "no linear layer"],
        ),
        (
            "bert",
            &["position_embeddings"],
            &["position_embeddings", "no linear layer"],
        ),
        ("bert", &["decoder"], &["'decoder'"]),
        (
            "sentences",
            &["pooler.dense"],
            &["pooler.dense", "no linear layer"],
        ),
    ] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let error = options(targets)
            .start(&checkpoint, &TOKENS, None)
            .unwrap_err()
            .to_string();
        for culprit in culprits {
            assert!(error.contains(culprit), "{error}");
        }
    }
    // No gradient of an embedding reaches the head.
    let lines = format!("{}\n", json!({"input_ids": [2, 77, 9], "definition_ids": [5, 6]}));
    let taught = TrainOptions {
        objective: Some(teach(TeachLoss::Cosine)),
        ..TrainOptions::default()
    };
    let model = with("bert", &start("bert", &[ALL_LINEAR]));
    let error = Trainer::new(model, dataset(&fixture("bert"), &lines), taught)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("cls.predictions.transform.dense"), "{error}");
}

fn saved(trainer: &Trainer, config: &Adapter) -> Adapter {
    let model = trainer.model();
    let (tokens, rows) = (model.embedding().tokens(), model.embedding().rows().unwrap());
    let builder = Adapter::builder(model.embedding_module(), &tokens, rows).lora(config.config().clone());
    model.add_low_rank(builder).unwrap().build().unwrap()
}

#[track_caller]
fn expect_same(what: &str, one: &Adapter, other: &Adapter) {
    assert!(
        one.modules()[0].rows().bits_eq(other.modules()[0].rows()),
        "{what}: rows"
    );
    let pairs = one
        .lora_weights()
        .unwrap()
        .into_iter()
        .zip(other.lora_weights().unwrap());
    for (one, other) in pairs {
        let factors = one.factors().unwrap().into_iter().zip(other.factors().unwrap());
        for (one, other) in factors {
            assert!(one.bits_eq(&other), "{what}");
        }
    }
}

/// Rows and weights train together by a gradient that is the slope of the loss; a run that is cut in two, and one that
/// computes activations again, goes the same way bit for bit.
#[test]
fn rows_and_weights_train_together() {
    const STEPS: usize = 6;
    for (name, targets, lines, objective) in [
        (
            "bert",
            &[ALL_LINEAR][..],
            labelled("bert"),
            Objective::Masked(None),
        ),
        (
            "roberta",
            &["query", "dense"],
            unlabelled(),
            Objective::Masked(Some(masking())),
        ),
        ("sentences", &[ALL_LINEAR], defined(), teach(TeachLoss::Cosine)),
        ("sentences", &[], defined(), teach(RANKING)),
    ] {
        let what = format!("{name}, {objective}");
        let start = start(name, targets);
        let new = |recompute| {
            let options = TrainOptions {
                objective: Some(objective.clone()),
                steps: Some(STEPS as u64),
                batch_size: 2,
                lr: 0.02,
                recompute,
                ..TrainOptions::default()
            };
            Trainer::new(with(name, &start), dataset(&fixture(name), &lines), options).unwrap()
        };
        let mut whole = new(false);
        let sound = |trainer: &mut Trainer| {
            let check = trainer.check_gradient().unwrap();
            assert!(check.relative_error < 0.05, "{what}: {check:?}");
        };
        sound(&mut whole);
        let before = whole.evaluate(whole.data()).unwrap().loss;
        (0..STEPS).for_each(|_| assert!(whole.step().unwrap().loss.is_finite()));
        let after = whole.evaluate(whole.data()).unwrap().loss;
        assert!(after < before, "{what}: {before} {after}");
        // With factors that are no longer 0, every one of them has a slope.
        sound(&mut whole);
        let end = saved(&whole, &start);
        for weights in end.lora_weights().unwrap() {
            assert!(
                weights.factors().unwrap()[1].norm() > 0.0,
                "{what}: {}",
                weights.path()
            );
        }

        let mut first = new(false);
        (0..2).for_each(|_| assert!(first.step().unwrap().loss.is_finite()));
        let mut second = new(true);
        let state = first.training_state().unwrap();
        second
            .resume(&saved(&first, &start), state, Path::new("state"))
            .unwrap();
        (2..STEPS).for_each(|_| assert!(second.step().unwrap().loss.is_finite()));
        expect_same(&what, &end, &saved(&second, &start));
        assert_eq!(second.activity(), whole.activity(), "{what}");
        assert_eq!(
            outputs(name, &with(name, &end)),
            outputs(name, second.model()),
            "{what}"
        );
    }
}

//! PEFT's whole-model fixtures: embeddings, logits and twenty steps of training.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use trainable_tokens_core::{PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, Checkpoint};
use trainable_tokens_trainer::{
    Dataset, Decoder, EMBEDDING_MODULE, ModelConfig, TrainOptions, Trainer, Vocabulary,
};

struct Case {
    dir: PathBuf,
    json: Value,
    expected: std::collections::HashMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Self {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/peft")).join(name);
        Self {
            json: serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap(),
            expected: candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap(),
            dir,
        }
    }

    fn checkpoint(&self, which: &str) -> Checkpoint {
        Checkpoint::open(self.dir.join(which)).unwrap()
    }

    fn token_ids(&self) -> Vec<u32> {
        let ids = self.json["token_indices"].as_array().unwrap();
        ids.iter()
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect()
    }

    /// A model in one of the states that operations name.
    fn model(&self, state: &str) -> Decoder {
        let load = |checkpoint: &str, tokens: &[u32], rows: Option<&TokenRows>| {
            Decoder::load(
                &self.checkpoint(checkpoint),
                tokens,
                rows,
                PaddingRule::NoLookupGradient,
                DType::F32,
                &Device::Cpu,
            )
            .unwrap()
        };
        match state {
            "base" => load("base", &[], None),
            "noop" => load("base", &self.token_ids(), None),
            "merged" => load("merged", &[], None),
            "adapter" => {
                let adapter = Adapter::read(self.dir.join("adapter")).unwrap();
                load("base", &self.token_ids(), adapter.rows(EMBEDDING_MODULE))
            }
            other => panic!("{other}"),
        }
    }

    fn flat(&self, name: &str) -> Vec<f32> {
        flat(&self.expected[name])
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.detach().flatten_all().unwrap().to_vec1().unwrap()
}

fn check(what: &str, got: &[f32], want: &[f32], atol: f64, rtol: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut worst = 0f64;
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        if atol == 0.0 && rtol == 0.0 {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{what}: element {index}: {got} {want}"
            );
        }
        let difference = f64::from((got - want).abs());
        worst = worst.max(difference);
        assert!(
            difference <= atol + rtol * f64::from(want.abs()),
            "{what}: element {index}: got {got}, want {want}"
        );
    }
    println!("{what}: largest difference {worst:.2e}");
}

fn forward(name: &str) {
    let case = Case::open(name);
    let mut checked = 0;
    for operation in case.json["operations"].as_array().unwrap() {
        let kind = operation["op"].as_str().unwrap();
        if !matches!(kind, "embed_forward" | "logits") {
            continue;
        }
        let state = operation["state"].as_str().unwrap();
        let model = case.model(state);
        let embeddings = model.embed(&case.expected["probe.input_ids"]).unwrap();
        let got = match kind {
            "logits" => model.logits(&model.hidden(&embeddings).unwrap()).unwrap(),
            _ => embeddings,
        };
        let [atol, rtol] = ["atol", "rtol"].map(|key| operation[key].as_f64().unwrap());
        let want = operation["expect"].as_str().unwrap();
        check(
            &format!("{name}: {want}"),
            &flat(&got),
            &case.flat(want),
            atol,
            rtol,
        );
        checked += 1;
    }
    assert_eq!(checked, 7, "{name}");
}

/// The batches of a case as JSON Lines.
fn write_batches(case: &Case, path: &Path) {
    let lines = |name: &str| {
        case.expected[name]
            .flatten_to(1)
            .unwrap()
            .to_vec2::<i64>()
            .unwrap()
    };
    let mut text = String::new();
    for (ids, labels) in lines("batch.input_ids").iter().zip(lines("batch.labels")) {
        writeln!(
            text,
            "{}",
            serde_json::json!({"input_ids": ids, "labels": labels})
        )
        .unwrap();
    }
    std::fs::write(path, text).unwrap();
}

fn trainer(case: &Case, data: &Path) -> Trainer {
    let operation = case.json["operations"]
        .as_array()
        .unwrap()
        .iter()
        .find(|op| op["op"] == "train")
        .unwrap();
    let spec = &operation["optimizer"];
    assert_eq!(spec["type"], "AdamW");
    let number = |name: &str| spec[name].as_f64().unwrap();
    let options = TrainOptions {
        batch_size: 2,
        lr: number("lr"),
        beta1: spec["betas"][0].as_f64().unwrap(),
        beta2: spec["betas"][1].as_f64().unwrap(),
        eps: number("eps"),
        weight_decay: number("weight_decay"),
        ..TrainOptions::default()
    };
    let base = case.checkpoint("base");
    let config = ModelConfig::read(&base.config_path()).unwrap();
    let data = Dataset::read(data, &Vocabulary::of_model(base.dir()), &config, None).unwrap();
    Trainer::new(case.model("noop"), data, options).unwrap()
}

fn train(name: &str) {
    let case = Case::open(name);
    let operation = case.json["operations"]
        .as_array()
        .unwrap()
        .iter()
        .find(|op| op["op"] == "train")
        .unwrap();
    let [loss_atol, delta_atol] = ["losses", "deltas"].map(|key| operation["atol"][key].as_f64().unwrap());
    let rtol = operation["rtol"].as_f64().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("batches.jsonl");
    write_batches(&case, &data);

    let mut trainer = trainer(&case, &data);
    let probe = trainer.check_gradient().unwrap();
    assert!(probe.relative_error < 0.1, "{probe:?}");
    assert_eq!(trainer.total_steps(), 20);
    let (losses, deltas) = (case.flat("losses"), case.flat("deltas"));
    let size = deltas.len() / 21;
    for step in 0..20 {
        let metrics = trainer.step().unwrap();
        #[allow(clippy::cast_possible_truncation)]
        check(
            &format!("{name}: loss {step}"),
            &[metrics.loss as f32],
            &losses[step..=step],
            loss_atol,
            rtol,
        );
        let rows = trainer.model().embedding().rows().unwrap().to_f32_vec();
        let want = &deltas[(step + 1) * size..][..size];
        check(
            &format!("{name}: rows after step {step}"),
            &rows,
            want,
            delta_atol,
            rtol,
        );
    }
    assert_eq!(
        trainer
            .largest_base_change(&case.checkpoint("base"))
            .unwrap()
            .to_bits(),
        0f64.to_bits()
    );

    // A run that is cut in two goes on bit for bit.
    let rows = trainer.model().embedding().rows().unwrap();
    let mut first = self::trainer(&case, &data);
    (0..7).for_each(|_| assert!(first.step().unwrap().loss > 0.0));
    let saved = (
        first.model().embedding().rows().unwrap(),
        first.training_state().unwrap(),
    );
    let mut second = self::trainer(&case, &data);
    second
        .resume(&saved.0, saved.1, Path::new("training_state.safetensors"))
        .unwrap();
    assert_eq!(second.steps_taken(), 7);
    (7..20).for_each(|_| assert!(second.step().unwrap().loss > 0.0));
    assert!(
        second.model().embedding().rows().unwrap().bits_eq(&rows),
        "{name}: resumed run"
    );
}

#[test]
fn llama_untied_forward() {
    forward("llama_untied");
}

#[test]
fn llama_tied_forward() {
    forward("llama_tied");
}

#[test]
fn llama_untied_train() {
    train("llama_untied");
}

#[test]
fn llama_tied_train() {
    train("llama_tied");
}

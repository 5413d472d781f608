//! PEFT's whole-model fixtures: twenty steps of training.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/case.rs"]
mod case;

use std::fmt::Write as _;
use std::path::Path;

use case::{Case, check};
use serde_json::{Value, json};
use trainable_tokens_trainer::{Dataset, ModelConfig, TrainOptions, Trainer, Vocabulary};

/// The training of a case.
fn training(case: &Case) -> &Value {
    let operations = case.fixture.json()["operations"].as_array().unwrap();
    operations.iter().find(|it| it["op"] == "train").unwrap()
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
        writeln!(text, "{}", json!({"input_ids": ids, "labels": labels})).unwrap();
    }
    std::fs::write(path, text).unwrap();
}

fn trainer(case: &Case, data: &Path, recompute: bool) -> Trainer {
    let operation = training(case);
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
        recompute,
        ..TrainOptions::default()
    };
    let base = case.base(&Value::Null);
    let config = ModelConfig::read(&base.config_path()).unwrap();
    let data = Dataset::read(data, &Vocabulary::of_model(base.dir()), &config, None).unwrap();
    Trainer::new(case.model(&json!({ "state": "noop" })), data, options).unwrap()
}

fn train(name: &str) {
    let case = Case::open(name);
    let operation = training(&case);
    let [loss_atol, delta_atol] = ["losses", "deltas"].map(|key| operation["atol"][key].as_f64().unwrap());
    let rtol = operation["rtol"].as_f64().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("batches.jsonl");
    write_batches(&case, &data);

    let mut trainer = trainer(&case, &data, false);
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
            [loss_atol, rtol],
        );
        let rows = trainer.model().embedding().rows().unwrap().to_f32_vec();
        let want = &deltas[(step + 1) * size..][..size];
        check(
            &format!("{name}: rows after step {step}"),
            &rows,
            want,
            [delta_atol, rtol],
        );
    }
    assert_eq!(
        trainer
            .largest_base_change(&case.base(&Value::Null))
            .unwrap()
            .to_bits(),
        0f64.to_bits()
    );

    // A run that is cut in two goes on bit for bit.
    let rows = trainer.model().embedding().rows().unwrap();
    let mut first = self::trainer(&case, &data, false);
    (0..7).for_each(|_| assert!(first.step().unwrap().loss > 0.0));
    let saved = (
        first.model().embedding().rows().unwrap(),
        first.training_state().unwrap(),
    );
    let mut second = self::trainer(&case, &data, false);
    second
        .resume(&saved.0, saved.1, Path::new("training_state.safetensors"))
        .unwrap();
    assert_eq!(second.steps_taken(), 7);
    (7..20).for_each(|_| assert!(second.step().unwrap().loss > 0.0));
    assert!(
        second.model().embedding().rows().unwrap().bits_eq(&rows),
        "{name}: resumed run"
    );

    // Activations that are computed again are the same.
    let mut thrifty = self::trainer(&case, &data, true);
    (0..20).for_each(|_| assert!(thrifty.step().unwrap().loss > 0.0));
    assert!(
        thrifty.model().embedding().rows().unwrap().bits_eq(&rows),
        "{name}: recomputation"
    );
}

#[test]
fn llama_untied_train() {
    train("llama_untied");
}

#[test]
fn llama_tied_train() {
    train("llama_tied");
}

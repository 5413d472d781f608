//! Accumulated gradients: against transformers' own trainer, and against one large batch.

use std::path::Path;

use serde_json::{Value, json};
use trainable_tokens_testkit::peft::fixtures;
use trainable_tokens_trainer::{Error, Schedule, TrainOptions};

use crate::case::{check, trainer};

/// What `tests/fixtures/transformers/trainer.py` wrote.
fn reference() -> Value {
    let path = fixtures().join("../transformers/trainer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(values) => values.iter().flat_map(floats).collect(),
        #[allow(clippy::cast_possible_truncation)]
        number => vec![number.as_f64().unwrap() as f32],
    }
}

#[test]
fn a_run_is_that_of_transformers() {
    let reference = reference();
    let tokens: Vec<u32> = serde_json::from_value(reference["tokens"].clone()).unwrap();
    let lines = reference["examples"].as_array().unwrap();
    let given = &reference["options"];
    let count = |name: &str| usize::try_from(given[name].as_u64().unwrap()).unwrap();
    let options = TrainOptions {
        steps: given["max_steps"].as_u64(),
        batch_size: count("per_device_train_batch_size"),
        accumulate: count("gradient_accumulation_steps"),
        lr: given["learning_rate"].as_f64().unwrap(),
        schedule: Schedule::Cosine,
        warmup_steps: given["warmup_steps"].as_u64().unwrap(),
        max_grad_norm: given["max_grad_norm"].as_f64(),
        ..TrainOptions::default()
    };
    for (name, run) in reference["runs"].as_object().unwrap() {
        let mut trainer = trainer(name, &tokens, lines, options.clone());
        let steps: Vec<_> = (0..4).map(|_| trainer.step().unwrap()).collect();
        #[allow(clippy::cast_possible_truncation)]
        for (field, got) in [
            (
                "losses",
                steps.iter().map(|step| step.loss as f32).collect::<Vec<_>>(),
            ),
            ("lr", steps.iter().map(|step| step.lr as f32).collect()),
            (
                "grad_norms",
                steps.iter().map(|step| step.grad_norm as f32).collect(),
            ),
        ] {
            check(
                &format!("{name}: {field}"),
                &got,
                &floats(&run[field]),
                [1e-6, 2e-6],
            );
        }
        let rows = trainer.model().embedding().rows().unwrap().to_f32_vec();
        check(
            &format!("{name}: rows"),
            &rows,
            &floats(&run["rows"]),
            [2e-6, 1e-5],
        );
    }
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let reference = reference();
    let tokens = [279, 12, 277];
    let lines = reference["examples"].as_array().unwrap();
    let run = |batch_size: usize, accumulate: usize| {
        let options = TrainOptions {
            steps: Some(6),
            batch_size,
            accumulate,
            lr: 0.01,
            shuffle: true,
            ..TrainOptions::default()
        };
        let mut trainer = trainer("llama_tied", &tokens, lines, options);
        let steps: Vec<_> = (0..6).map(|_| trainer.step().unwrap()).collect();
        (steps, trainer.model().embedding().rows().unwrap().to_f32_vec())
    };
    let (whole, rows) = run(6, 1);
    for (batch_size, accumulate) in [(1, 6), (2, 3), (3, 2)] {
        let (steps, accumulated) = run(batch_size, accumulate);
        for (one, other) in whole.iter().zip(&steps) {
            assert_eq!((one.step, one.tokens), (other.step, other.tokens));
            assert!((one.loss - other.loss).abs() < 1e-6, "{one:?} {other:?}");
            let relative = (one.grad_norm / other.grad_norm - 1.0).abs();
            assert!(relative < 1e-5, "{one:?} {other:?}");
        }
        check(
            &format!("{accumulate} batches"),
            &accumulated,
            &rows,
            [2e-6, 1e-5],
        );
    }
}

#[test]
fn a_batch_without_a_target_adds_nothing() {
    let line = |ids: &[u32], target: bool| {
        if target {
            json!({"input_ids": ids})
        } else {
            json!({"input_ids": ids, "labels": vec![-100; ids.len()]})
        }
    };
    let run = |lines: &[Value], accumulate| {
        let options = TrainOptions {
            batch_size: 1,
            accumulate,
            ..TrainOptions::default()
        };
        let mut trainer = trainer("llama_untied", &[12, 7], lines, options);
        let step = trainer.step();
        (step, trainer.model().embedding().rows().unwrap())
    };
    let full = line(&[1, 12, 40, 7, 9], true);
    let (alone, rows) = run(std::slice::from_ref(&full), 1);
    let (accumulated, same) = run(&[line(&[5, 6, 12], false), full], 2);
    assert_eq!(alone.unwrap().loss, accumulated.unwrap().loss);
    assert!(rows.bits_eq(&same));

    let (refused, _) = run(&[line(&[5, 6, 12], false), line(&[7, 6, 12], false)], 2);
    let error = refused.unwrap_err();
    assert!(matches!(error, Error::Dataset { .. }), "{error}");
    assert!(error.to_string().contains("no target"), "{error}");
}

#[test]
fn a_state_belongs_to_the_number_of_batches() {
    let lines = [
        json!({"input_ids": [1, 12, 40, 7, 9]}),
        json!({"input_ids": [12, 4, 7]}),
    ];
    let build = |accumulate| {
        let options = TrainOptions {
            steps: Some(3),
            batch_size: 1,
            accumulate,
            ..TrainOptions::default()
        };
        trainer("llama_untied", &[12, 7], &lines, options)
    };
    let state = build(2).training_state().unwrap();
    let rows = build(2).model().embedding().rows().unwrap();
    let tokens = build(2).model().embedding().tokens().clone();
    let adapter = trainable_tokens_format::Adapter::builder("model.embed_tokens", &tokens, rows)
        .build()
        .unwrap();
    let path = Path::new("state");
    build(2).resume(&adapter, state.clone(), path).unwrap();
    let error = build(3).resume(&adapter, state, path).unwrap_err().to_string();
    assert!(
        error.contains("number of accumulated batches is 2, not 3"),
        "{error}"
    );
}

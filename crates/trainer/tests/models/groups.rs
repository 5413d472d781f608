//! Learning rates of single tokens, frozen rows, and norms that rows keep.

use std::path::Path;

use serde_json::{Map, Value, json};
use trainable_tokens_core::TokenRows;
use trainable_tokens_format::Adapter;
use trainable_tokens_trainer::{
    DecayToward, Error, NormTarget, OptimizerKind, Schedule, TrainOptions, Trainer,
};

use crate::case::trainer;

const STEPS: u64 = 5;

fn lines() -> Vec<Value> {
    let ids = [
        [1, 12, 40, 7, 9, 31],
        [7, 12, 31, 5, 44, 12],
        [60, 31, 2, 7, 4, 8],
    ];
    ids.map(|ids| json!({"input_ids": ids})).to_vec()
}

fn options() -> TrainOptions {
    TrainOptions {
        steps: Some(STEPS),
        batch_size: 2,
        lr: 0.05,
        weight_decay: 0.1,
        schedule: Schedule::Linear,
        warmup_steps: 2,
        ..TrainOptions::default()
    }
}

fn rows(trainer: &Trainer) -> TokenRows {
    trainer.model().embedding().rows().unwrap()
}

fn run(tokens: &[u32], options: TrainOptions) -> TokenRows {
    let mut trainer = trainer("llama_untied", tokens, &lines(), options);
    (0..STEPS).for_each(|_| assert!(trainer.step().unwrap().loss > 0.0));
    rows(&trainer)
}

/// The bits of one row.
fn row(rows: &TokenRows, slot: usize) -> Vec<u8> {
    let bytes = rows.to_le_bytes();
    bytes[slot * bytes.len() / rows.num_rows()..][..bytes.len() / rows.num_rows()].to_vec()
}

fn each_optimizer(check: impl Fn(TrainOptions)) {
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Adam, OptimizerKind::Sgd] {
        for decay_toward in [DecayToward::Zero, DecayToward::Original] {
            check(TrainOptions {
                optimizer,
                decay_toward,
                momentum: 0.9,
                ..options()
            });
        }
    }
}

/// A frozen row keeps its bits, and the others train as if its token had not been chosen.
#[test]
fn a_frozen_token_is_as_one_that_was_not_chosen() {
    each_optimizer(|options| {
        let frozen = TrainOptions {
            token_lr: vec![(12, 0.0)],
            max_row_norm: Some(0.5),
            ..options.clone()
        };
        let alone = TrainOptions {
            max_row_norm: Some(0.5),
            ..options
        };
        let start = rows(&trainer("llama_untied", &[31, 12, 7], &lines(), alone.clone()));
        let (with, without) = (run(&[31, 12, 7], frozen), run(&[31, 7], alone));
        assert_eq!(row(&with, 1), row(&start, 1));
        assert_eq!(row(&with, 0), row(&without, 0));
        assert_eq!(row(&with, 2), row(&without, 1));
        assert_ne!(row(&with, 0), row(&start, 0));
    });
}

/// However a learning rate is said, it counts for its own rows alone.
#[test]
fn a_token_follows_its_own_learning_rate() {
    each_optimizer(|options| {
        let own = |token_lr: &[(u32, f64)], lr| TrainOptions {
            token_lr: token_lr.to_vec(),
            lr,
            ..options.clone()
        };
        // The same learning rate said in two ways.
        let plain = run(&[31, 12, 7], own(&[], 0.01));
        let said = run(&[31, 12, 7], own(&[(31, 0.01), (7, 0.01)], 0.01));
        assert!(plain.bits_eq(&said));
        let split = run(&[31, 12, 7], own(&[(31, 0.01), (12, 0.01), (7, 0.01)], 0.5));
        assert!(plain.bits_eq(&split));
        // One row at a time, the others frozen.
        let alone = run(&[31, 12, 7], own(&[(12, 0.02), (31, 0.0), (7, 0.0)], 0.5));
        let chosen = run(&[12], own(&[], 0.02));
        assert_eq!(row(&alone, 1), row(&chosen, 0));
        assert_ne!(row(&alone, 1), row(&run(&[12], own(&[], 0.01)), 0));
    });
}

#[test]
fn groups_resume_bit_for_bit() {
    let options = TrainOptions {
        token_lr: vec![(12, 0.0), (7, 0.2)],
        match_norm: Some(NormTarget::Original),
        ..options()
    };
    let tokens = [31, 12, 7];
    let mut straight = trainer("llama_untied", &tokens, &lines(), options.clone());
    (0..STEPS).for_each(|_| assert!(straight.step().unwrap().loss > 0.0));
    let whole = rows(&straight);
    for cut in 0..=STEPS {
        let mut first = trainer("llama_untied", &tokens, &lines(), options.clone());
        (0..cut).for_each(|_| assert!(first.step().unwrap().loss > 0.0));
        let set = first.model().embedding().tokens().clone();
        let adapter = Adapter::builder(first.model().embedding_module(), &set, rows(&first))
            .build()
            .unwrap();
        let state = first.training_state().unwrap();
        for (name, tensor) in &state.optimizer.tensors {
            assert_eq!(tensor.num_rows(), 3, "{name}");
        }
        let mut second = trainer("llama_untied", &tokens, &lines(), options.clone());
        second.resume(&adapter, state, Path::new("state")).unwrap();
        (cut..STEPS).for_each(|_| assert!(second.step().unwrap().loss > 0.0));
        assert!(rows(&second).bits_eq(&whole), "after {cut} steps");
        assert_eq!(second.activity(), straight.activity(), "after {cut} steps");
    }
}

/// A state from before the counts were saved says nothing of them: they start anew.
#[test]
fn counts_of_a_state_are_of_its_tokens_or_absent() {
    let tokens = [31, 12, 7];
    let mut first = trainer("llama_untied", &tokens, &lines(), options());
    (0..3).for_each(|_| assert!(first.step().unwrap().loss > 0.0));
    let set = first.model().embedding().tokens().clone();
    let adapter = Adapter::builder(first.model().embedding_module(), &set, rows(&first));
    let adapter = adapter.build().unwrap();
    let resume = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut state = first.training_state().unwrap();
        change(state.extra.as_object_mut().unwrap());
        let mut second = trainer("llama_untied", &tokens, &lines(), options());
        let resumed = second.resume(&adapter, state, Path::new("state"));
        resumed.map(|()| second.activity().to_vec())
    };
    assert_eq!(resume(&|_| ()).unwrap(), first.activity());
    assert!(first.activity().iter().any(|it| it.occurrences > 0));
    let old = resume(&|extra| assert!(extra.remove("activity").is_some())).unwrap();
    assert!(
        old.iter()
            .all(|it| (it.occurrences, it.steps_reached, it.idle_steps) == (0, 0, 0))
    );
    for wrong in [json!([1, 2]), json!([1, 2, 3, 4]), json!([1, 2, -3]), json!("3")] {
        let error = resume(&|extra| extra["activity"]["idle_steps"] = wrong.clone()).unwrap_err();
        assert!(matches!(error, Error::Resume { .. }), "{error}");
    }
}

#[test]
fn rows_keep_their_norms() {
    let tokens = [31, 12, 7];
    let close = |norms: &[f64], want: &[f64]| {
        for (norm, want) in norms.iter().zip(want) {
            assert!((norm - want).abs() < 1e-6 * want, "{norms:?} {want}");
        }
    };
    let start = rows(&trainer("llama_untied", &tokens, &lines(), options())).row_norms();
    let plain = run(&tokens, options()).row_norms();
    let matched = |target| TrainOptions {
        match_norm: Some(target),
        ..options()
    };
    close(&run(&tokens, matched(NormTarget::Original)).row_norms(), &start);
    assert!((plain[0] / start[0] - 1.0).abs() > 1e-3, "{plain:?} {start:?}");

    let model = trainer("llama_untied", &tokens, &lines(), options());
    let table = model
        .model()
        .embedding()
        .table()
        .tensor()
        .to_vec2::<f32>()
        .unwrap();
    let norm = |row: &Vec<f32>| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let mean = table.iter().map(norm).sum::<f64>() / table.len() as f64;
    close(&run(&tokens, matched(NormTarget::Mean)).row_norms(), &[mean; 3]);

    let limit = f64::midpoint(plain[0], plain[1]);
    let clamped = run(
        &tokens,
        TrainOptions {
            max_row_norm: Some(limit),
            ..options()
        },
    );
    assert!(
        clamped
            .row_norms()
            .iter()
            .all(|norm| *norm <= limit * (1.0 + 1e-6))
    );
    assert!(plain.iter().any(|norm| *norm > limit));
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |options: TrainOptions| {
        let base = crate::case::Case::open("llama_untied");
        let model = base.model(&json!({"state": "noop"}));
        let data = trainer("llama_untied", &[12], &lines(), self::options());
        Trainer::new(model, data.data().clone(), options)
            .err()
            .unwrap()
            .to_string()
    };
    let own = |token_lr: &[(u32, f64)]| TrainOptions {
        token_lr: token_lr.to_vec(),
        ..options()
    };
    for (options, part) in [
        (
            own(&[(5, 0.1)]),
            "token id 5 has a learning rate of its own, but it does not train",
        ),
        (
            own(&[(12, -0.1)]),
            "token id 12 is -0.1, but it must be at least 0",
        ),
        (own(&[(12, f64::NAN)]), "token id 12 is NaN"),
        (
            own(&[(12, 0.1), (12, 0.2)]),
            "token id 12 is given two learning rates",
        ),
        (
            own(&[(299, 0.0), (297, 0.0), (298, 0.0), (12, 0.0)]),
            "nothing trains: every token has a learning rate of 0",
        ),
        (
            TrainOptions {
                max_row_norm: Some(0.0),
                ..options()
            },
            "max_norm",
        ),
    ] {
        let message = refused(options);
        assert!(message.contains(part), "{message}");
    }
}

//! The training state is read back bit for bit.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use serde_json::json;
use trainable_tokens_core::{OptimizerState, TokenRows};
use trainable_tokens_format::{Error, SafetensorsFile, TrainingState};

fn state() -> TrainingState {
    let rows = |from: f64| {
        let values = (0..6).map(|at| from / f64::from(at + 3)).collect();
        TokenRows::new::<f64>(values, 2, 3).unwrap()
    };
    TrainingState {
        optimizer: OptimizerState {
            step: u64::MAX,
            tensors: vec![
                ("exp_avg".to_owned(), rows(1.0)),
                ("exp_avg_sq".to_owned(), rows(-0.0)),
            ],
        },
        extra: json!({"seed": u64::MAX, "lr": 0.1, "loss": 1.000_000_000_000_000_2, "é": [null, "\n"]}),
    }
}

#[test]
fn a_state_round_trips() {
    let dir = tempfile::tempdir().unwrap();
    for state in [state(), TrainingState::default()] {
        state.write_into(dir.path()).unwrap();
        let path = dir.path().join(TrainingState::FILE_NAME);
        let back = TrainingState::read(&path).unwrap();
        assert_eq!(back, state);
        assert_eq!(back.to_bytes().unwrap(), fs::read(&path).unwrap());
    }
}

#[test]
fn tensors_bear_the_names_of_torch() {
    let file = SafetensorsFile::from_bytes("x", state().to_bytes().unwrap()).unwrap();
    let names: Vec<_> = file.names().collect();
    assert_eq!(names, ["optimizer.exp_avg", "optimizer.exp_avg_sq"]);
}

#[test]
fn what_is_no_state_is_refused() {
    let adapter = common::fixtures().join("standalone_f32/adapter/adapter_model.safetensors");
    let error = TrainingState::read(adapter).unwrap_err();
    assert!(error.to_string().contains("this is no training state"), "{error}");
    assert!(matches!(
        TrainingState::read("nowhere"),
        Err(Error::NotFound { .. })
    ));
    let mut twice = state();
    let first = twice.optimizer.tensors[0].clone();
    twice.optimizer.tensors.push(first);
    assert!(twice.to_bytes().is_err());
    let text = String::from_utf8_lossy(&state().to_bytes().unwrap()).into_owned();
    assert!(text.contains(r#"\"format_version\":1"#), "{text}");
}

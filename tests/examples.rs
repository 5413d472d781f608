//! The example of each backend prints the same numbers, and so does the one that is generic over them.
//!
//! `cargo test` builds the examples before it runs this; a run of this test alone needs `cargo build --examples` with the
//! same features first.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;
use std::process::Command;

const BACKENDS: [&str; 4] = ["ndarray", "candle", "burn", "dfdx"];

/// The lines `step … loss …` that an example prints.
fn losses(example: &str) -> Vec<String> {
    let test = std::env::current_exe().unwrap();
    let target = test.parent().and_then(|deps| deps.parent()).unwrap();
    let program: PathBuf = target
        .join("examples")
        .join(example)
        .with_extension(std::env::consts::EXE_EXTENSION);
    assert!(
        program.exists(),
        "{} is missing; run `cargo build --examples`",
        program.display()
    );
    let output = Command::new(program).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{example}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    printed
        .lines()
        .filter(|line| line.starts_with("step "))
        .map(str::to_owned)
        .collect()
}

#[test]
fn all_backends_print_the_same_numbers() {
    let reference = losses("ndarray");
    assert_eq!(reference.len(), 5, "{reference:?}");
    assert_ne!(reference[0], reference[4], "nothing is learned");
    for backend in BACKENDS {
        assert_eq!(losses(backend), reference, "{backend}");
    }
    assert_eq!(losses("generic"), BACKENDS.map(|_| reference.clone()).concat());
}

#[test]
fn examples_are_short() {
    for backend in BACKENDS {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("examples")
            .join(backend)
            .with_extension("rs");
        let lines = std::fs::read_to_string(path).unwrap().lines().count();
        assert!(lines <= 80, "{backend} has {lines} lines");
    }
}

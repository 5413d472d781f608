//! One training run in every backend: a small model of an embedding, a frozen projection and the tied head, with the
//! framework's own forward and backward passes.
//!
//! Where only copies are involved bits are equal; elsewhere losses and rows stay within [`TOLERANCE`] of the reference
//! backend's over the whole run.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "equivalence/burn.rs"]
mod burn;
#[path = "equivalence/candle.rs"]
mod candle;
#[path = "equivalence/dfdx.rs"]
mod dfdx;
#[path = "equivalence/ndarray.rs"]
mod ndarray;
#[path = "support/noise.rs"]
mod noise;
#[path = "equivalence/run.rs"]
mod run;

use run::{Run, STEPS, Start, optimizers, train, train_from};

type Nd = ndarray::Harness;
type Candle = candle::Harness;
type Burn = burn::Harness;
type Dfdx = dfdx::Harness;

/// How far losses and rows may lie apart over 50 steps, absolutely; rows are of the size of one. (Sums in another order
/// made 5e-7 at most when this was written.)
const TOLERANCE: f64 = 5e-6;

/// Runs one expression per backend, with `$Backend` bound to its harness, and collects name and value.
macro_rules! in_every_backend {
    ($Backend:ident => $value:expr) => {
        [
            ("ndarray", {
                type $Backend = Nd;
                $value
            }),
            ("candle", {
                type $Backend = Candle;
                $value
            }),
            ("burn", {
                type $Backend = Burn;
                $value
            }),
            ("dfdx", {
                type $Backend = Dfdx;
                $value
            }),
        ]
    };
}

fn assert_close(what: &str, got: &Run, want: &Run) {
    for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
        assert!(
            (got - want).abs() <= TOLERANCE,
            "{what}: loss of step {step} is {got}, the reference has {want}"
        );
    }
    for (step, (got, want)) in got.rows.iter().zip(&want.rows).enumerate() {
        for (got, want) in got.to_f64_vec().into_iter().zip(want.to_f64_vec()) {
            assert!(
                (got - want).abs() <= TOLERANCE,
                "{what}: after step {step} {got}, the reference has {want}"
            );
        }
    }
}

#[test]
fn every_backend_trains_alike() {
    for (name, optimizer) in optimizers() {
        let runs = in_every_backend!(B => train::<B>(&mut *optimizer(), STEPS));
        let (_, reference) = &runs[0];
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (
            mean(&reference.losses[..10]),
            mean(&reference.losses[STEPS - 10..]),
        );
        assert!(
            last < first - 0.1,
            "{name}: the loss falls from {first} to {last} only"
        );
        for (backend, run) in &runs {
            assert_close(&format!("{name} in {backend}"), run, reference);
            assert!(run.base_unchanged, "{name} in {backend}: the base changed");
        }
    }
}

/// The first forward pass copies rows only.
#[test]
fn untrained_rows_come_out_with_equal_bits() {
    let rows = in_every_backend!(B => run::embedded::<B>());
    for (backend, got) in &rows {
        assert!(got.bits_eq(&rows[0].1), "{backend}");
    }
}

/// The reference's gradients into the shared optimizers: equal bits at every step, in every backend.
#[test]
fn equal_gradients_give_equal_bits() {
    for (name, optimizer) in optimizers() {
        let gradients = train::<Nd>(&mut *optimizer(), STEPS).gradients;
        let runs = in_every_backend!(B => run::replay::<B>(&mut *optimizer(), &gradients));
        for (backend, run) in &runs {
            for (step, (got, want)) in run.rows.iter().zip(&runs[0].1.rows).enumerate() {
                assert!(got.bits_eq(want), "{name} in {backend}: step {step}");
            }
        }
    }
}

/// Every backend saves a run half-way, every backend resumes it: all 4 x 4 end where the uninterrupted run ends, with
/// equal bits if it is the same backend.
#[test]
fn every_backend_resumes_every_other() {
    for (name, optimizer) in optimizers() {
        let saved = in_every_backend!(B => {
            let dir = tempfile::tempdir().unwrap();
            let whole = train::<B>(&mut *optimizer(), STEPS);
            run::save::<B>(&mut *optimizer(), STEPS / 2, dir.path());
            (dir, whole)
        });
        for (writer, (dir, whole)) in &saved {
            let resumed = in_every_backend!(B => {
                let mut optimizer = optimizer();
                let start = Start::load(dir.path(), &mut *optimizer);
                train_from::<B>(&start, &mut *optimizer, STEPS / 2, STEPS)
            });
            let rest = whole.after(STEPS / 2);
            for (reader, run) in &resumed {
                let what = format!("{name}: saved by {writer}, resumed by {reader}");
                assert_close(&what, run, &rest);
                if reader == writer {
                    assert!(
                        run.rows[run.rows.len() - 1].bits_eq(&rest.rows[rest.rows.len() - 1]),
                        "{what}"
                    );
                }
            }
        }
    }
}

/// Files of equal rows have equal bytes, whoever writes them.
#[test]
fn every_backend_writes_the_same_bytes() {
    for (name, optimizer) in optimizers() {
        let gradients = train::<Nd>(&mut *optimizer(), 3).gradients;
        let files = in_every_backend!(B => {
            let dir = tempfile::tempdir().unwrap();
            run::save_replay::<B>(&mut *optimizer(), &gradients, dir.path());
            ["adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"]
                .map(|file| std::fs::read(dir.path().join("adapter").join(file)).unwrap())
        });
        for (backend, bytes) in &files {
            assert!(*bytes == files[0].1, "{name}: {backend} writes other bytes");
        }
    }
}

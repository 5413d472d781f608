//! Every case that PEFT made, and the golden vectors.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use std::path::Path;

use half::f16;
use harness::OnCpu;
use trainable_tokens_testkit::{peft_tests, vectors};

// dfdx has no bfloat16: tables of that type are widened to `f32`, as `DfdxTable::load` does.
peft_tests! { f32: OnCpu<f32>, f16: OnCpu<f16>, bf16: OnCpu<f32> }

#[test]
fn the_golden_vectors() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors");
    let runs = [
        vectors::run::<OnCpu<f64>>(&dir),
        vectors::run::<OnCpu<f32>>(&dir),
        vectors::run::<OnCpu<f16>>(&dir),
    ];
    for count in runs {
        assert!(count.unwrap() > 20);
    }
}

//! Every case that PEFT made.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::Nd;
use trainable_tokens_testkit::peft_tests;

peft_tests! { f32: Nd<f32>, f16: Nd<f16>, bf16: Nd<bf16> }

/// What a framework without half types would run.
mod wider {
    use super::Nd;
    use trainable_tokens_testkit::peft_tests;

    peft_tests! { f32: Nd<f64>, f16: Nd<f32>, bf16: Nd<f32> }
}

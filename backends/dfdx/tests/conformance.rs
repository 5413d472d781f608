//! The whole conformance kit, on the CPU. bfloat16 is left out: dfdx does not have it.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::f16;
use harness::OnCpu;
use trainable_tokens_testkit::conformance_tests;

conformance_tests! {
    f64: OnCpu<f64>, without loss "the loss is one of logits",
    f32: OnCpu<f32>, without loss "the loss is one of logits",
    f16: OnCpu<f16>, without loss "the loss is one of logits",
}

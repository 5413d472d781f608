//! The whole conformance kit.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::Nd;
use trainable_tokens_testkit::conformance_tests;

conformance_tests! { f64: Nd<f64>, f32: Nd<f32>, f16: Nd<f16>, bf16: Nd<bf16> }

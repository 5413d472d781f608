//! The whole conformance kit.
#![allow(missing_docs, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::Nested;
use trainable_tokens_testkit::conformance_tests;

conformance_tests! { f64: Nested<f64>, f32: Nested<f32>, f16: Nested<f16>, bf16: Nested<bf16> }

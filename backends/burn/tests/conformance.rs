//! The whole conformance kit, on Flex.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::OnFlex;
use trainable_tokens_testkit::conformance_tests;

conformance_tests! { f64: OnFlex<f64>, f32: OnFlex<f32>, f16: OnFlex<f16>, bf16: OnFlex<bf16> }

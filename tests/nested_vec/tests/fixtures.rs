//! Every case that PEFT made.
#![allow(missing_docs, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::Nested;
use trainable_tokens_testkit::peft_tests;

peft_tests! { f32: Nested<f32>, f16: Nested<f16>, bf16: Nested<bf16> }

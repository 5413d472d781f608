//! Every case that PEFT made.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::f16;
use harness::OnCpu;
use trainable_tokens_testkit::peft_tests;

// dfdx has no bfloat16: tables of that type are widened to `f32`, as `DfdxTable::load` does.
peft_tests! { f32: OnCpu<f32>, f16: OnCpu<f16>, bf16: OnCpu<f32> }

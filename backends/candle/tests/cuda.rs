//! The whole conformance kit on the first CUDA device: `cargo test -p trainable-tokens-candle --features cuda --test cuda`.
#![cfg(feature = "cuda")]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use std::sync::OnceLock;

use candle_core::Device;
use half::{bf16, f16};
use harness::{On, Place};
use trainable_tokens_testkit::conformance_tests;

struct Cuda;

impl Place for Cuda {
    fn device() -> Device {
        // Two devices of one card are different ones to candle.
        static DEVICE: OnceLock<Device> = OnceLock::new();
        DEVICE.get_or_init(|| Device::new_cuda(0).unwrap()).clone()
    }
}

conformance_tests! { f64: On<Cuda, f64>, f32: On<Cuda, f32>, f16: On<Cuda, f16>, bf16: On<Cuda, bf16> }

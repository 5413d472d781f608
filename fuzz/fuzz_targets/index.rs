//! See `trainable_tokens_fuzz::index`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| trainable_tokens_fuzz::index(input));

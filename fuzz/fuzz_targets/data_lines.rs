//! See `trainable_tokens_fuzz::data_lines`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| trainable_tokens_fuzz::data_lines(input));

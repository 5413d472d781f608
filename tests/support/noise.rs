//! Numbers to compute with, the same on every machine.

use trainable_tokens::{DType, TokenRows};

/// Numbers between -1 and 1 with few digits, in the given type; the same for the same seed.
pub(crate) fn noise(seed: u64, dtype: DType, rows: usize, columns: usize) -> TokenRows {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f64::from(u16::try_from(state >> 48).unwrap()) / 32_768.0 - 1.0
    };
    let values = (0..rows * columns).map(|_| next()).collect();
    TokenRows::new::<f64>(values, rows, columns)
        .unwrap()
        .to_dtype(dtype)
}

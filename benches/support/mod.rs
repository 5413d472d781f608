//! One workload for all benches: Gemma 2 2B's width, 4096 tokens, a tenth of them trained, 128 rows.
#![allow(dead_code)]

/// Vocabularies that are compared: cost must not grow with them.
pub(crate) const VOCABULARIES: [usize; 2] = [32_000, 256_000];
/// Length of a row.
pub(crate) const DIM: usize = 2304;
/// Tokens in a batch.
pub(crate) const TOKENS: usize = 4096;
/// Rows that train.
pub(crate) const ROWS: u32 = 128;

/// A table `[v, DIM]`.
pub(crate) fn table(v: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 65536.0 - 0.5
    };
    (0..v * DIM).map(|_| next()).collect()
}

/// The last rows of the table, spread out.
pub(crate) fn trained_ids(v: usize) -> Vec<u32> {
    let last = u32::try_from(v).unwrap_or(u32::MAX) - 1;
    (0..ROWS).map(|slot| last - slot * 7).collect()
}

/// Ids all over the vocabulary, every tenth of them a trained one.
pub(crate) fn batch(v: usize) -> Vec<u32> {
    let (trained, v) = (trained_ids(v), u32::try_from(v).unwrap_or(u32::MAX));
    let id = |at: u32| {
        if at.is_multiple_of(10) {
            trained[(at / 10 % ROWS) as usize]
        } else {
            at.wrapping_mul(2_654_435_761) % v
        }
    };
    (0..4096).map(id).collect()
}

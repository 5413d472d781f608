//! One workload for all benches: Gemma 2 2B's width, 4096 tokens, a tenth of them trained, 128 rows.
#![allow(dead_code, clippy::unwrap_used)]

use std::fmt;

use trainable_tokens::{Element, TokenSet};

/// Sizes of a table and of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    /// Rows of the table.
    pub(crate) vocab_size: usize,
    /// Length of a row.
    pub(crate) dim: usize,
    /// Tokens in a batch.
    pub(crate) tokens: usize,
    /// Rows that train.
    pub(crate) rows: usize,
}

/// The point that all others are compared with.
pub(crate) const REFERENCE: Workload = Workload {
    vocab_size: 256_000,
    dim: 2304,
    tokens: 4096,
    rows: 128,
};

impl Workload {
    /// The reference at another vocabulary.
    pub(crate) const fn of(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            ..REFERENCE
        }
    }

    /// What the benches measure: the reference, and points along each size, with tables of at most 3 GB.
    pub(crate) fn sweep() -> impl Iterator<Item = Self> {
        let wide = [32_000, 256_000, 1_000_000].map(|vocab_size| Self {
            dim: 768,
            ..Self::of(vocab_size)
        });
        let batches = [512, 4096, 16_384].map(|tokens| Self {
            tokens,
            ..Self::of(32_000)
        });
        let rows = [1, 1000, 30_000].map(|rows| Self {
            rows,
            ..Self::of(32_000)
        });
        let dims = [256, 8192].map(|dim| Self {
            dim,
            ..Self::of(32_000)
        });
        let all = [REFERENCE].into_iter().chain(wide).chain(batches);
        all.chain(rows).chain(dims)
    }

    /// A table `[V, D]` of numbers between -0.5 and 0.5: a block of noise over and over, for the sake of speed.
    pub(crate) fn table<T: Element>(&self) -> Vec<T> {
        values(self.vocab_size * self.dim)
    }

    /// A gradient of the rows of a batch, `[N, D]`.
    pub(crate) fn upstream<T: Element>(&self) -> Vec<T> {
        values(self.tokens * self.dim)
    }

    /// The tokens that train, spread over the end of the table, backwards.
    pub(crate) fn trained_ids(&self) -> Vec<u32> {
        let (last, rows) = (small(self.vocab_size) - 1, small(self.rows));
        let stride = (last / rows).clamp(1, 7);
        (0..rows).map(|slot| last - slot * stride).collect()
    }

    /// [`trained_ids`](Self::trained_ids) as a set.
    pub(crate) fn token_set(&self) -> TokenSet {
        TokenSet::new(self.trained_ids(), self.vocab_size).unwrap()
    }

    /// Ids all over the vocabulary, every tenth of them a trained one.
    pub(crate) fn batch(&self) -> Vec<u32> {
        let (trained, vocab_size) = (self.trained_ids(), small(self.vocab_size));
        let id = |at: u32| {
            if at.is_multiple_of(10) {
                trained[(at / 10) as usize % trained.len()]
            } else {
                at.wrapping_mul(2_654_435_761) % vocab_size
            }
        };
        (0..small(self.tokens)).map(id).collect()
    }

    /// [`batch`](Self::batch) as the indices of slices.
    pub(crate) fn indices(&self) -> Vec<usize> {
        self.batch().into_iter().map(|id| id as usize).collect()
    }

    /// [`batch`](Self::batch) as signed integers.
    pub(crate) fn signed(&self) -> Vec<i32> {
        self.batch().into_iter().map(u32::cast_signed).collect()
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            vocab_size,
            dim,
            tokens,
            rows,
        } = self;
        write!(f, "V={vocab_size} D={dim} N={tokens} k={rows}")
    }
}

fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap()
}

fn values<T: Element>(len: usize) -> Vec<T> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::from_f32(f32::from((state >> 16) as u16) / 65536.0 - 0.5)
    };
    // No multiple of a row's length, so that rows differ.
    let block: Vec<T> = (0..len.min((1 << 18) + 1)).map(|_| next()).collect();
    let mut values = Vec::with_capacity(len);
    while values.len() < len {
        values.extend_from_slice(&block[..block.len().min(len - values.len())]);
    }
    values
}

//! How a loss is computed.

use crate::{Error, Result};

/// The label that never counts, as in torch and transformers.
pub const IGNORED_LABEL: i64 = -100;

/// How the cross-entropy of a head is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// The limit of the logits (Gemma 2); none if absent.
    pub softcap: Option<Softcap>,
    /// What becomes of the losses of the rows.
    pub reduction: Reduction,
    /// A label that does not count, besides [`IGNORED_LABEL`]: a padding token's id, for instance.
    pub ignore_index: Option<i64>,
    /// How many rows of logits exist at once. It changes results in rounding only.
    pub chunk: LogitsChunk,
}

/// The bound of logits that are softly capped: `softcap * tanh(logits / softcap)`, Gemma 2's `final_logit_softcapping`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Softcap(f64);

impl Softcap {
    /// Checks the bound.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless `softcap` is a finite number above 0.
    pub fn new(softcap: f64) -> Result<Self> {
        if softcap > 0.0 && softcap.is_finite() {
            return Ok(Self(softcap));
        }
        Err(Error::Hyperparameter {
            name: "softcap",
            value: softcap,
            must: "above 0",
        })
    }

    /// The bound.
    pub fn get(self) -> f64 {
        self.0
    }
}

/// What becomes of the losses of the rows that count; the names are torch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum divided by how many they are.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// How many rows of logits exist at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogitsChunk(Limit);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Bytes(usize),
    Rows(usize),
}

impl LogitsChunk {
    /// As many rows as fit into `bytes`, but at least one.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] for no byte.
    pub fn bytes(bytes: usize) -> Result<Self> {
        at_least_one("bytes of a chunk of logits", bytes).map(|bytes| Self(Limit::Bytes(bytes)))
    }

    /// This many rows.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] for no row.
    pub fn rows(rows: usize) -> Result<Self> {
        at_least_one("rows of a chunk of logits", rows).map(|rows| Self(Limit::Rows(rows)))
    }

    /// The most rows of `row_bytes` bytes each: at least one.
    pub fn max_rows(self, row_bytes: usize) -> usize {
        match self.0 {
            Limit::Bytes(bytes) => (bytes / row_bytes.max(1)).max(1),
            Limit::Rows(rows) => rows,
        }
    }
}

impl Default for LogitsChunk {
    /// 128 MiB: 131 rows of `f32` logits over 256000 tokens.
    fn default() -> Self {
        Self(Limit::Bytes(128 << 20))
    }
}

fn at_least_one(name: &'static str, value: usize) -> Result<usize> {
    match value {
        0 => Err(Error::Hyperparameter {
            name,
            value: 0.0,
            must: "at least 1",
        }),
        _ => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked() {
        for bad in [0.0, -30.0, f64::NAN, f64::INFINITY] {
            let error = Softcap::new(bad).unwrap_err();
            assert!(error.to_string().starts_with("softcap is "), "{error}");
        }
        assert_eq!(Softcap::new(30.0).unwrap().get(), 30.0);
        assert!(LogitsChunk::rows(0).is_err() && LogitsChunk::bytes(0).is_err());
    }

    #[test]
    fn a_chunk_keeps_to_its_budget() {
        let default = LogitsChunk::default();
        assert_eq!(default.max_rows(256_000 * 4), 131);
        assert_eq!(default.max_rows(usize::MAX), 1);
        assert_eq!(LogitsChunk::bytes(1).unwrap().max_rows(4), 1);
        assert_eq!(LogitsChunk::bytes(12).unwrap().max_rows(0), 12);
        assert_eq!(LogitsChunk::rows(5).unwrap().max_rows(1 << 40), 5);
    }
}

//! Tables, token sets and batches to try, and the dense definition of what must come out.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use trainable_tokens_core::{DType, TokenRows, TokenSet};

use crate::failure::Exact;
use crate::{Failure, Harness, Layer, Outcome};

/// The environment variable that repeats the inputs of a failed run.
pub(crate) const SEED_VARIABLE: &str = "TRAINABLE_TOKENS_SEED";
/// Inputs that each property is tried with.
const INPUTS: u32 = 24;
/// Smaller inputs that are tried for one that fails.
const SHRINKS: u32 = 500;

/// One table, token set and batch.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) v: usize,
    pub(crate) d: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) ids: Vec<u32>,
    pub(crate) seed: u64,
}

/// Tables from 1 x 1; token sets from none to all, in any order; batches with repeats and both edges.
pub(crate) fn world() -> impl Strategy<Value = World> {
    (1usize..30, 1usize..9, any::<u64>()).prop_flat_map(|(v, d, seed)| {
        let all: Vec<u32> = (0u32..).take(v).collect();
        let last = all[v - 1];
        let tokens = prop_oneof![
            5 => proptest::sample::subsequence(all.clone(), 0..=v),
            1 => Just(Vec::new()),
            1 => Just(all),
        ]
        .prop_shuffle();
        let id = prop_oneof![4 => 0..=last, 1 => Just(0), 1 => Just(last)];
        let ids = proptest::collection::vec(id, 1..30);
        (tokens, ids).prop_map(move |(tokens, ids)| World {
            v,
            d,
            tokens,
            ids,
            seed,
        })
    })
}

/// Tries a property with many worlds; the failure says how to see them again.
pub(crate) fn for_all(property: impl Fn(&World) -> Outcome) -> Outcome {
    for_each_of(world(), property)
}

/// Tries a property with many inputs; the failure says how to see them again.
pub(crate) fn for_each_of<S: Strategy>(inputs: S, property: impl Fn(&S::Value) -> Outcome) -> Outcome {
    let seed = match std::env::var(SEED_VARIABLE) {
        Ok(text) => u64::from_str_radix(&text, 16)?,
        Err(_) => RandomState::new().hash_one(0),
    };
    println!("{SEED_VARIABLE}={seed:016x}");
    let config = Config {
        cases: INPUTS,
        failure_persistence: None,
        max_shrink_iters: SHRINKS,
        ..Config::default()
    };
    let bytes = [seed; 4].map(u64::to_le_bytes).concat();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let test = |input: S::Value| {
        property(&input).map_err(|failure| TestCaseError::fail(failure.reason().to_owned()))
    };
    TestRunner::new_with_rng(config, rng)
        .run(&inputs, test)
        .map_err(|error| {
            Failure::new(format!(
                "{error}\n({SEED_VARIABLE}={seed:016x} repeats these inputs)"
            ))
        })
}

/// Values between -1 and 1, the same for the same seed, in the given type.
pub(crate) fn noise(seed: u64, dtype: DType, rows: usize, columns: usize) -> TokenRows {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f64::from_bits(0x3ff0_0000_0000_0000 | state >> 12) * 2.0 - 3.0
    };
    let values: Vec<f64> = (0..rows * columns).map(|_| next()).collect();
    from_f64(values, dtype, rows, columns)
}

/// As [`noise`], with every value now and then that copies tend to get wrong.
pub(crate) fn odd_values(seed: u64, dtype: DType, rows: usize, columns: usize) -> TokenRows {
    const ODD: [f64; 8] = [
        -0.0,
        0.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        6e-8,
        1e-40,
        65504.0,
    ];
    let mut values = noise(seed, DType::F64, rows, columns).to_f64_vec();
    for (at, value) in values.iter_mut().enumerate() {
        if at % 3 == 0 {
            *value = ODD[(at / 3 + (seed % 8) as usize) % 8];
        }
    }
    with_payloads(&from_f64(values, dtype, rows, columns))
}

/// The same values, but every NaN is a negative one with a payload.
fn with_payloads(rows: &TokenRows) -> TokenRows {
    let (dtype, size) = (rows.dtype(), rows.dtype().size_in_bytes());
    let nan: &[u8] = match dtype {
        DType::F64 => &[0x21, 0x43, 0x65, 0, 0, 0, 0xfa, 0xff],
        DType::F32 => &[0x21, 0x43, 0xe5, 0xff],
        DType::F16 => &[0x21, 0xff],
        DType::BF16 => &[0xe5, 0xff],
    };
    let mut bytes = rows.to_le_bytes();
    for (value, bytes) in rows.to_f64_vec().iter().zip(bytes.chunks_exact_mut(size)) {
        if value.is_nan() {
            bytes.copy_from_slice(nan);
        }
    }
    TokenRows::from_le_bytes(dtype, rows.num_rows(), rows.embedding_dim(), &bytes)
        .unwrap_or_else(|_| rows.clone())
}

fn from_f64(values: Vec<f64>, dtype: DType, rows: usize, columns: usize) -> TokenRows {
    TokenRows::new(values, rows, columns).map_or_else(
        |_| TokenRows::zeros(dtype, rows, columns),
        |rows| rows.to_dtype(dtype),
    )
}

/// Rows `ids` of `table`, in that order: the oracle of a lookup.
pub(crate) fn select(table: &TokenRows, ids: &[u32]) -> Result<TokenRows, Failure> {
    let (bytes, size) = (
        table.to_le_bytes(),
        table.embedding_dim() * table.dtype().size_in_bytes(),
    );
    let rows: Vec<u8> = ids
        .iter()
        .flat_map(|id| bytes[*id as usize * size..][..size].iter().copied())
        .collect();
    Ok(TokenRows::from_le_bytes(
        table.dtype(),
        ids.len(),
        table.embedding_dim(),
        &rows,
    )?)
}

/// `table` with rows `tokens` overwritten by `rows`, rounded to its type: the oracle of a merge.
pub(crate) fn overwritten(table: &TokenRows, tokens: &[u32], rows: &TokenRows) -> Result<TokenRows, Failure> {
    let size = table.embedding_dim() * table.dtype().size_in_bytes();
    let mut bytes = table.to_le_bytes();
    let rows = rows.to_dtype(table.dtype()).to_le_bytes();
    for (id, row) in tokens.iter().zip(rows.chunks_exact(size)) {
        bytes[*id as usize * size..][..size].copy_from_slice(row);
    }
    Ok(TokenRows::from_le_bytes(
        table.dtype(),
        table.num_rows(),
        table.embedding_dim(),
        &bytes,
    )?)
}

impl World {
    /// A world of chosen sizes, for cases whose input does not vary.
    pub(crate) fn fixed(v: usize, d: usize, tokens: &[u32], ids: &[u32]) -> Self {
        Self {
            v,
            d,
            tokens: tokens.to_vec(),
            ids: ids.to_vec(),
            seed: 7,
        }
    }

    pub(crate) fn table<H: Harness + ?Sized>(&self) -> TokenRows {
        noise(self.seed, H::DTYPE, self.v, self.d)
    }

    pub(crate) fn token_set(&self) -> Result<TokenSet, Failure> {
        Ok(TokenSet::new(self.tokens.iter().copied(), self.v)?)
    }

    /// Rows that are not the base's, in the type that rows over the harness's tables train in.
    pub(crate) fn rows<H: Harness + ?Sized>(&self) -> TokenRows {
        self.rows_of(H::DTYPE.default_row_dtype())
    }

    pub(crate) fn rows_of(&self, dtype: DType) -> TokenRows {
        noise(self.seed ^ 0x55aa, dtype, self.tokens.len(), self.d)
    }

    /// A layer whose rows are still the base's.
    pub(crate) fn fresh<H: Harness + ?Sized>(&self) -> Result<Layer<H>, Failure> {
        self.over::<H>(&self.table::<H>())
    }

    /// A layer over another table, its rows the table's.
    pub(crate) fn over<H: Harness + ?Sized>(&self, table: &TokenRows) -> Result<Layer<H>, Failure> {
        Ok(Layer::<H>::new(H::source(table)?, self.token_set()?)?)
    }

    /// A layer with [`rows`](Self::rows).
    pub(crate) fn trained<H: Harness + ?Sized>(&self) -> Result<Layer<H>, Failure> {
        let source = H::source(&self.table::<H>())?;
        Ok(Layer::<H>::with_rows(
            source,
            self.token_set()?,
            &self.rows::<H>(),
        )?)
    }

    /// The table that [`trained`](Self::trained) stands for.
    pub(crate) fn dense<H: Harness + ?Sized>(&self) -> Result<TokenRows, Failure> {
        overwritten(&self.table::<H>(), &self.tokens, &self.rows::<H>())
    }

    /// A gradient of a lookup of the batch.
    pub(crate) fn upstream<H: Harness + ?Sized>(&self) -> TokenRows {
        noise(self.seed ^ 0x1234, H::DTYPE, self.ids.len(), self.d)
    }

    /// Hidden states for the head.
    pub(crate) fn hidden<H: Harness + ?Sized>(&self) -> TokenRows {
        noise(self.seed ^ 0x77, H::DTYPE, 3, self.d)
    }

    /// A gradient of the logits of [`hidden`](Self::hidden).
    pub(crate) fn logits_upstream<H: Harness + ?Sized>(&self) -> TokenRows {
        noise(self.seed ^ 0x99, H::DTYPE, 3, self.v)
    }

    /// The rows of `gradient`, dense over the vocabulary, that belong to the trainable tokens.
    pub(crate) fn chosen(&self, gradient: &Exact) -> Exact {
        gradient.select(&self.tokens)
    }
}

/// Reads the whole table back.
pub(crate) fn whole<H: Harness + ?Sized>(layer: &Layer<H>) -> Result<TokenRows, Failure> {
    use trainable_tokens_core::{EmbeddingSource, TokenId};
    let ids: Vec<TokenId> = (0u32..).take(layer.source().vocab_size()).map(TokenId).collect();
    Ok(layer.source().read_rows(&ids)?)
}

/// What the layer returns for a batch, on the host.
pub(crate) fn lookup<H: Harness + ?Sized>(layer: &Layer<H>, ids: &[u32]) -> Result<TokenRows, Failure> {
    Ok(H::read(&layer.lookup(ids)?)?)
}

/// What the layer's head returns, on the host.
pub(crate) fn logits<H: Harness + ?Sized>(
    layer: &Layer<H>,
    hidden: &TokenRows,
) -> Result<TokenRows, Failure> {
    Ok(H::read(&layer.logits(H::hidden(layer, hidden)?)?)?)
}

/// What the layer returns for a batch of examples that choose their adapters, on the host.
pub(crate) fn lookup_mixed<H: Harness + ?Sized>(
    layer: &Layer<H>,
    ids: &[u32],
    adapters: &[Option<&str>],
) -> Result<TokenRows, Failure> {
    Ok(H::read(&layer.lookup_mixed(ids, adapters)?)?)
}

//! How trained rows start.

mod error;
mod mode;
mod random;
mod statistics;
#[cfg(test)]
mod tests;
mod text;

pub use error::InitError;
pub use mode::{InitMode, InitModifier, Population, RowInit};
use random::{Normals, Purpose};
use statistics::{Statistics, covariance_samples, norm};
pub use text::{InitText, ParseInitError};

use crate::{DType, EmbeddingSource, Error, Result, TokenId, TokenRows, TokenSet};

/// Elements of the table that are read at a time: a few MiB, whatever `V` and `D` are.
const BLOCK: usize = 1 << 18;

impl RowInit {
    /// The starting rows of `tokens`, `[k, D]` in slot order and of type `dtype`, all initialised this way.
    ///
    /// ```
    /// # use trainable_tokens_core::{EmbeddingSource, Error, RowInit, TokenRows, TokenSet};
    /// # fn start<S: EmbeddingSource>(table: &S) -> Result<TokenRows, Box<dyn std::error::Error>>
    /// # where S::Error: 'static {
    /// let tokens = TokenSet::new([31_998, 31_999], table.vocab_size())?;
    /// let init: RowInit = "mean+noise:0.01+norm-match+seed:7".parse()?;
    /// let rows = init.rows(table, &tokens, table.dtype().default_row_dtype())?;
    /// # Ok(rows) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`initial_rows`].
    pub fn rows<S: EmbeddingSource + ?Sized>(
        &self,
        source: &S,
        tokens: &TokenSet,
        dtype: DType,
    ) -> Result<TokenRows, S::Error> {
        initial_rows(source, tokens, &vec![self.clone(); tokens.len()], dtype)
    }
}

/// The mean of the L2 norms of all rows of a table, which is read a block at a time.
///
/// # Errors
///
/// [`InitError`] for a row that is not finite; those of the source.
pub fn mean_row_norm<S: EmbeddingSource + ?Sized>(source: &S) -> Result<f64, S::Error> {
    let none = TokenSet::new([], source.vocab_size())?;
    let asks = RowInit::default().with(InitModifier::NormMatch { target: None });
    Ok(Statistics::of(source, &none, &[asks], BLOCK)?.mean_norm)
}

/// The starting rows of `tokens`, `[k, D]` in slot order and of type `dtype`; `inits` says for each slot how its row
/// is made.
///
/// Everything is computed in `f64`, sums in the order of the rows' ids, and rounded to `dtype` at the end, so that
/// equal tables give equal bits in every backend. The table is read a block at a time, at most twice, and not at all
/// where no statistic of it is asked for. The time of [`InitMode::MeanCovariance`] is `k * V * D`.
///
/// A table that is about to grow has no rows yet for the tokens after its last: `tokens` is then made for the larger
/// vocabulary, and means and norms are still those of the rows that are there.
///
/// # Errors
///
/// [`Error::Shape`] unless there is one init per slot and `tokens` was made for a table of this size or a larger one;
/// [`Error::TokenOutOfRange`], [`Error::Hyperparameter`] or [`Error::Init`], naming the culprit; the table's errors.
pub fn initial_rows<S: EmbeddingSource + ?Sized>(
    source: &S,
    tokens: &TokenSet,
    inits: &[RowInit],
    dtype: DType,
) -> Result<TokenRows, S::Error> {
    initial_rows_by(source, tokens, inits, dtype, BLOCK)
}

/// As [`initial_rows`], reading about `block` elements at a time.
fn initial_rows_by<S: EmbeddingSource + ?Sized>(
    source: &S,
    tokens: &TokenSet,
    inits: &[RowInit],
    dtype: DType,
    block: usize,
) -> Result<TokenRows, S::Error> {
    let (k, dim) = (tokens.len(), source.embedding_dim());
    if tokens.vocab_size() < source.vocab_size() {
        let (expected, got) = ([source.vocab_size()], [tokens.vocab_size()]);
        return Err(Error::shape("vocabulary of the token set", &expected, &got).into());
    }
    if inits.len() != k {
        return Err(Error::shape("list of inits", &[k], &[inits.len()]).into());
    }
    for init in inits {
        init.check()?;
        source.check_ids(&init.mode.sources())?;
    }
    let (slots, kept) = kept_rows(source, tokens, inits)?;
    if inits.iter().all(RowInit::keeps_base) {
        // A copy within one type keeps every bit, also of what is no number.
        return Ok(kept.to_dtype(dtype));
    }
    let statistics = Statistics::of(source, tokens, inits, block)?;
    let mut samples = covariance_samples(source, tokens, inits, &statistics, block)?.into_iter();
    let mut rows = vec![0.0; k * dim];
    for (slot, row) in slots.iter().zip(kept.to_f64_vec().chunks_exact(dim.max(1))) {
        rows[slot * dim..(slot + 1) * dim].copy_from_slice(row);
    }
    for (slot, (id, init)) in tokens.ids().iter().zip(inits).enumerate() {
        let row = &mut rows[slot * dim..(slot + 1) * dim];
        match &init.mode {
            InitMode::Keep => {}
            InitMode::Zeros => row.fill(0.0),
            InitMode::Normal { std } => {
                let mut normals = Normals::new(init.seed, *id, Purpose::Row);
                row.fill_with(|| std * normals.draw());
            }
            InitMode::Mean { over } => row.copy_from_slice(statistics.mean(*over)),
            InitMode::MeanCovariance { .. } => row.copy_from_slice(&samples.next().unwrap_or_default()),
            InitMode::Copy(from) => row.copy_from_slice(&finite_rows(source, &[*from])?),
            InitMode::MeanOf(ids) => {
                let others = finite_rows(source, ids)?;
                row.fill(0.0);
                for (at, x) in others.iter().enumerate() {
                    row[at % dim] += x;
                }
                row.iter_mut().for_each(|sum| *sum /= ids.len() as f64);
            }
            InitMode::Interpolate { from, to, t } => {
                let ends = finite_rows(source, &[*from, *to])?;
                let (from, to) = ends.split_at(dim);
                for (x, (from, to)) in row.iter_mut().zip(from.iter().zip(to)) {
                    *x = (1.0 - t) * from + t * to;
                }
            }
        }
        if init.keeps_base() {
            continue;
        }
        expect_finite(*id, row)?;
        for (at, modifier) in (0..).zip(&init.modifiers) {
            match modifier {
                InitModifier::Noise { std } => {
                    let mut normals = Normals::new(init.seed, *id, Purpose::Noise(at));
                    row.iter_mut().for_each(|x| *x += std * normals.draw());
                }
                InitModifier::NormMatch { target } => {
                    let norm = norm(row);
                    if norm == 0.0 {
                        return Err(Error::from(InitError::ZeroNorm { id: *id }).into());
                    }
                    let factor = target.unwrap_or(statistics.mean_norm) / norm;
                    row.iter_mut().for_each(|x| *x *= factor);
                }
            }
            expect_finite(*id, row)?;
        }
    }
    let rows = TokenRows::new::<f64>(rows, k, dim)?.to_dtype(dtype);
    let rounded = rows.to_f64_vec();
    for ((id, init), row) in tokens
        .ids()
        .iter()
        .zip(inits)
        .zip(rounded.chunks_exact(dim.max(1)))
    {
        let column = row.iter().position(|x| !x.is_finite());
        if let (false, Some(column)) = (init.keeps_base(), column) {
            return Err(Error::from(InitError::Overflow {
                id: *id,
                column,
                dtype,
            })
            .into());
        }
    }
    Ok(rows)
}

/// The slots whose tokens have a row in the table, and these rows.
fn kept_rows<S: EmbeddingSource + ?Sized>(
    source: &S,
    tokens: &TokenSet,
    inits: &[RowInit],
) -> Result<(Vec<usize>, TokenRows), S::Error> {
    let (mut slots, mut ids) = (Vec::new(), Vec::new());
    for (slot, (id, init)) in tokens.ids().iter().zip(inits).enumerate() {
        if id.row() < source.vocab_size() {
            slots.push(slot);
            ids.push(*id);
        } else if init.mode == InitMode::Keep {
            return Err(Error::from(InitError::NoRow { id: *id }).into());
        }
    }
    Ok((slots, source.read_rows(&ids)?))
}

/// Rows of the table, row-major, all of their elements numbers.
fn finite_rows<S: EmbeddingSource + ?Sized>(source: &S, ids: &[TokenId]) -> Result<Vec<f64>, S::Error> {
    let rows = source.read_rows(ids)?.to_f64_vec();
    for (id, row) in ids.iter().zip(rows.chunks_exact(source.embedding_dim().max(1))) {
        expect_finite(*id, row)?;
    }
    Ok(rows)
}

fn expect_finite(id: TokenId, row: &[f64]) -> Result<()> {
    match row.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(column) => Err(InitError::NotFinite { id, column }.into()),
    }
}

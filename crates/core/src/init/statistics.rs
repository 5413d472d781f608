//! Sums over the whole table, a block at a time.

use super::random::{Normals, Purpose};
use super::{InitMode, InitModifier, Population, RowInit, expect_finite};
use crate::{EmbeddingSource, InitError, Result, TokenId, TokenSet};

/// What is asked of the whole table; what is not asked for stays empty.
pub(super) struct Statistics {
    of_all: Vec<f64>,
    of_others: Vec<f64>,
    /// Mean of the L2 norms of all rows.
    pub(super) mean_norm: f64,
}

impl Statistics {
    /// One pass over the table, if it takes one.
    pub(super) fn of<S: EmbeddingSource + ?Sized>(
        source: &S,
        tokens: &TokenSet,
        inits: &[RowInit],
        block: usize,
    ) -> Result<Self, S::Error> {
        let asks = |population| {
            inits
                .iter()
                .any(|init| init.mode.population() == Some(population))
        };
        let default_norm = |modifier: &InitModifier| *modifier == InitModifier::NormMatch { target: None };
        let norms = inits.iter().any(|init| init.modifiers.iter().any(default_norm));
        let (all, others) = (asks(Population::All), asks(Population::Others));
        let sums = |asked| vec![0.0; if asked { source.embedding_dim() } else { 0 }];
        let mut found = Self {
            of_all: sums(all),
            of_others: sums(others),
            mean_norm: 0.0,
        };
        if !(all || others || norms) {
            return Ok(found);
        }
        let mut count_others = 0u32;
        for_each_row(source, block, |id, row| {
            let other = !tokens.contains(id);
            // A row that is not asked for may hold anything.
            if all || norms || other {
                expect_finite(id, row)?;
            }
            add(&mut found.of_all, row);
            if other {
                add(&mut found.of_others, row);
                count_others += 1;
            }
            if norms {
                found.mean_norm += norm(row);
            }
            Ok(())
        })?;
        if others && count_others == 0 {
            return Err(crate::Error::from(InitError::NoOthers).into());
        }
        let count = source.vocab_size() as f64;
        found.of_all.iter_mut().for_each(|sum| *sum /= count);
        found
            .of_others
            .iter_mut()
            .for_each(|sum| *sum /= f64::from(count_others));
        found.mean_norm /= count;
        Ok(found)
    }

    /// The mean row.
    pub(super) fn mean(&self, over: Population) -> &[f64] {
        match over {
            Population::All => &self.of_all,
            Population::Others => &self.of_others,
        }
    }
}

impl InitMode {
    fn population(&self) -> Option<Population> {
        match self {
            Self::Mean { over } | Self::MeanCovariance { over, .. } => Some(*over),
            _ => None,
        }
    }
}

/// A sample for every slot that asks for one, in slot order, in one pass over the table.
///
/// With independent normal weights `z`, the sum `Σ z_v (x_v - mean)` has the covariance `Σ (x_v - mean)(x_v - mean)ᵀ`,
/// exactly: no `D x D` matrix, no factorisation, and no exception for tables whose covariance has not the full rank.
pub(super) fn covariance_samples<S: EmbeddingSource + ?Sized>(
    source: &S,
    tokens: &TokenSet,
    inits: &[RowInit],
    statistics: &Statistics,
    block: usize,
) -> Result<Vec<Vec<f64>>, S::Error> {
    struct Sample {
        scale: f64,
        over: Population,
        weights: Normals,
        sum: Vec<f64>,
    }
    let dim = source.embedding_dim();
    let sample = |(id, init): (&TokenId, &RowInit)| match init.mode {
        InitMode::MeanCovariance { scale, over } => Some(Sample {
            scale,
            over,
            weights: Normals::new(init.seed, *id, Purpose::Row),
            sum: vec![0.0; dim],
        }),
        _ => None,
    };
    let mut samples: Vec<Sample> = tokens.ids().iter().zip(inits).filter_map(sample).collect();
    if samples.is_empty() {
        return Ok(Vec::new());
    }
    let mut count_others = 0u32;
    for_each_row(source, block, |id, row| {
        let other = !tokens.contains(id);
        count_others += u32::from(other);
        for sample in &mut samples {
            if other || sample.over == Population::All {
                let weight = sample.weights.draw();
                let centred = row
                    .iter()
                    .zip(statistics.mean(sample.over))
                    .map(|(x, mean)| x - mean);
                sample
                    .sum
                    .iter_mut()
                    .zip(centred)
                    .for_each(|(sum, x)| *sum += weight * x);
            }
        }
        Ok(())
    })?;
    let finished = samples.into_iter().map(|sample| {
        let count = match sample.over {
            Population::All => source.vocab_size() as f64,
            Population::Others => f64::from(count_others),
        };
        let factor = (sample.scale / count).sqrt();
        let mean = statistics.mean(sample.over).iter();
        mean.zip(sample.sum)
            .map(|(mean, sum)| mean + factor * sum)
            .collect()
    });
    Ok(finished.collect())
}

/// The L2 norm.
pub(super) fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn add(sums: &mut [f64], row: &[f64]) {
    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
}

/// Shows every row of the table, in the order of ids, reading about `block` elements at a time.
fn for_each_row<S: EmbeddingSource + ?Sized>(
    source: &S,
    block: usize,
    mut show: impl FnMut(TokenId, &[f64]) -> Result<()>,
) -> Result<(), S::Error> {
    let dim = source.embedding_dim();
    let at_a_time = (block / dim.max(1)).max(1);
    let mut ids = (0u32..).take(source.vocab_size()).map(TokenId);
    loop {
        let some: Vec<TokenId> = ids.by_ref().take(at_a_time).collect();
        if some.is_empty() {
            return Ok(());
        }
        let rows = source.read_rows(&some)?.to_f64_vec();
        for (at, id) in some.iter().enumerate() {
            show(*id, &rows[at * dim..(at + 1) * dim])?;
        }
    }
}

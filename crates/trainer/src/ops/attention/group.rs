//! Attention of one example's queries that share a head of keys and values.

use std::ops::Range;

use candle_core::Result;
use num_traits::Zero;
use trainable_tokens_candle::matrix::{Matrix, Old, multiply};

use super::AttentionKind;
use super::rotation::{Angles, Direction};
use crate::ops::storage::{Real, dot, real};

/// The positions whose scores are in memory at a time: few enough that hidden scores are left out and memory stays
/// small, enough for quick products.
const BLOCK: usize = 64;

/// Queries `[Q, heads, head_dim]`, keys and values `[L, head_dim]`, rotated.
pub(super) struct Group<'a, C> {
    kind: &'a AttentionKind,
    angles: Option<&'a Angles<C>>,
    query: Vec<C>,
    key: Vec<C>,
    value: Vec<C>,
    heads: usize,
    head_dim: usize,
    /// `Q`.
    queries: usize,
    /// `L`.
    length: usize,
    /// How many of its positions hold something.
    held: usize,
    threads: usize,
}

/// The gradients of a group's queries, keys and values, before rotation.
pub(super) struct GroupGradient<C> {
    pub(super) query: Vec<C>,
    pub(super) key: Vec<C>,
    pub(super) value: Vec<C>,
}

/// Successive queries, and the keys that any of them sees.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<'a, C: Real> Group<'a, C> {
    pub(super) fn new(
        kind: &'a AttentionKind,
        angles: Option<&'a Angles<C>>,
        [mut query, mut key, value]: [Vec<C>; 3],
        head_dim: usize,
        held: Option<usize>,
        threads: usize,
    ) -> Self {
        let heads = kind.query_heads / kind.key_heads;
        if let Some(angles) = angles {
            angles.rotate(&mut query, heads, Direction::Forward);
            angles.rotate(&mut key, 1, Direction::Forward);
        }
        let rows = |values: &[C], width: usize| values.len().checked_div(width).unwrap_or(0);
        let (queries, length) = (rows(&query, heads * head_dim), rows(&key, head_dim));
        Self {
            kind,
            angles,
            query,
            key,
            value,
            heads,
            head_dim,
            queries,
            length,
            held: held.unwrap_or(length),
            threads,
        }
    }

    /// The mixtures of values, `[Q, heads, head_dim]`.
    pub(super) fn forward(&self) -> Result<Vec<C>> {
        let mut out = vec![<C as Zero>::zero(); self.query.len()];
        let mut weights = Vec::new();
        for block in self.blocks() {
            self.weights(&block, &mut weights, None)?;
            self.multiply(
                (&mut out[self.rows(&block)], Old::Replace),
                matrix(&weights, block.keys.len()),
                self.of_keys(&self.value, &block),
                C::one(),
            )?;
        }
        Ok(out)
    }

    /// The gradients from that of the mixtures.
    pub(super) fn backward(&self, upstream: &[C]) -> Result<GroupGradient<C>> {
        let scale = real(self.kind.scale);
        let zeros = |like: &[C]| vec![<C as Zero>::zero(); like.len()];
        let (mut query, mut key, mut value) = (zeros(&self.query), zeros(&self.key), zeros(&self.value));
        let (mut weights, mut slopes, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for block in self.blocks() {
            self.weights(&block, &mut weights, Some(&mut slopes))?;
            let (rows, width) = (self.rows(&block), block.keys.len());
            let keys = block.keys.start * self.head_dim..block.keys.end * self.head_dim;
            let up = matrix(&upstream[rows.clone()], self.head_dim);
            self.multiply(
                (&mut value[keys.clone()], Old::Add),
                matrix(&weights, width).transposed(),
                up,
                C::one(),
            )?;

            // The gradient of the weights becomes that of the scores.
            scores.resize(weights.len(), <C as Zero>::zero());
            self.multiply(
                (&mut scores, Old::Replace),
                up,
                self.of_keys(&self.value, &block).transposed(),
                C::one(),
            )?;
            let each = scores.chunks_exact_mut(width).zip(weights.chunks_exact(width));
            for (scores, weights) in each {
                let mean = dot(scores, weights);
                let each = scores.iter_mut().zip(weights);
                each.for_each(|(score, weight)| *score = (*score - mean) * *weight);
            }
            let each = scores.iter_mut().zip(&slopes);
            each.for_each(|(score, slope)| *score = *score * *slope);

            let scores = matrix(&scores, width);
            self.multiply(
                (&mut query[rows.clone()], Old::Replace),
                scores,
                self.of_keys(&self.key, &block),
                scale,
            )?;
            self.multiply(
                (&mut key[keys], Old::Add),
                scores.transposed(),
                matrix(&self.query[rows], self.head_dim),
                scale,
            )?;
        }
        if let Some(angles) = self.angles {
            angles.rotate(&mut query, self.heads, Direction::Gradient);
            angles.rotate(&mut key, 1, Direction::Gradient);
        }
        Ok(GroupGradient { query, key, value })
    }

    fn blocks(&self) -> impl Iterator<Item = Block> {
        (0..self.queries).step_by(BLOCK).map(|start| {
            let queries = start..self.queries.min(start + BLOCK);
            let (first, last) = (self.visible(start), self.visible(queries.end - 1));
            let keys = first.start..last.end;
            Block { queries, keys }
        })
    }

    /// The keys that a query sees.
    fn visible(&self, query: usize) -> Range<usize> {
        let position = self.length - self.queries + query;
        self.kind.mask.visible(position, self.held)
    }

    /// Where a block's queries, and what belongs to them, lie.
    fn rows(&self, block: &Block) -> Range<usize> {
        let width = self.heads * self.head_dim;
        block.queries.start * width..block.queries.end * width
    }

    /// The rows of the keys, or values, that a block sees.
    fn of_keys<'b>(&self, all: &'b [C], block: &Block) -> Matrix<'b, C> {
        let keys = block.keys.start * self.head_dim..block.keys.end * self.head_dim;
        matrix(&all[keys], self.head_dim)
    }

    /// Writes a block's weights, `[queries, heads, keys]`: each row's softmax over the keys that its query sees, 0 for
    /// the others. With a cap, the slopes of capped scores too, of the same shape; without, no slopes.
    fn weights(&self, block: &Block, weights: &mut Vec<C>, slopes: Option<&mut Vec<C>>) -> Result<()> {
        let width = block.keys.len();
        weights.resize(block.queries.len() * self.heads * width, <C as Zero>::zero());
        self.multiply(
            (weights, Old::Replace),
            matrix(&self.query[self.rows(block)], self.head_dim),
            self.of_keys(&self.key, block).transposed(),
            real(self.kind.scale),
        )?;
        if let Some(cap) = self.kind.softcap {
            let cap: C = real(cap);
            weights
                .iter_mut()
                .for_each(|score| *score = (*score / cap).tanh());
            if let Some(slopes) = slopes {
                slopes.clear();
                slopes.extend(weights.iter().map(|tanh| C::one() - *tanh * *tanh));
            }
            weights.iter_mut().for_each(|tanh| *tanh = *tanh * cap);
        }
        for (row, weights) in weights.chunks_exact_mut(width).enumerate() {
            let query = block.queries.start + row / self.heads;
            let visible = self.visible(query);
            softmax(
                weights,
                visible.start - block.keys.start..visible.end - block.keys.start,
            );
        }
        Ok(())
    }

    fn multiply(
        &self,
        (out, old): (&mut [C], Old),
        left: Matrix<'_, C>,
        right: Matrix<'_, C>,
        factor: C,
    ) -> Result<()> {
        let width = right.columns();
        multiply(left, right, factor, (old, out, width), self.threads)
    }
}

/// As many rows of `width` as there are.
fn matrix<C: Real>(values: &[C], width: usize) -> Matrix<'_, C> {
    Matrix::new(values, [values.len().checked_div(width).unwrap_or(0), width])
}

/// Softmax over the visible scores of a row; the others become 0.
fn softmax<C: Real>(row: &mut [C], visible: Range<usize>) {
    row[..visible.start].fill(C::zero());
    row[visible.end..].fill(C::zero());
    let seen = &mut row[visible];
    let highest = seen
        .iter()
        .fold(C::neg_infinity(), |highest, score| highest.max(*score));
    let mut sum = C::zero();
    for score in seen.iter_mut() {
        *score = (*score - highest).exp();
        sum = sum + *score;
    }
    let factor = sum.recip();
    seen.iter_mut().for_each(|weight| *weight = *weight * factor);
}

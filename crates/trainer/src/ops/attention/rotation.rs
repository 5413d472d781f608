//! Rotary position embeddings (Su et al. 2021).

use candle_core::{D, Result, Tensor};

use crate::ops::frozen::mul_frozen;
use crate::ops::storage::{Number, Real, with_elements};

/// Cosines and sines of the angles by which each dimension of a head turns at each position, `[L, head_dim]`: dimension
/// `i` pairs with `i + head_dim / 2`.
#[derive(Clone, Debug)]
pub(crate) struct Rotation {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

/// The same numbers on the CPU, in the type that arithmetic runs in.
pub(super) struct Angles<C> {
    cos: Vec<C>,
    sin: Vec<C>,
    head_dim: usize,
}

impl Rotation {
    /// Rotates queries or keys `[B, heads, L, head_dim]` of the last positions with candle's operations.
    pub(super) fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let length = x.dim(D::Minus2)?;
        let of_last = |table: &Tensor| table.narrow(0, table.dim(0)?.saturating_sub(length), length);
        let half = x.dim(D::Minus1)? / 2;
        let first = x.narrow(D::Minus1, 0, half)?;
        let second = x.narrow(D::Minus1, half, half)?;
        let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
        mul_frozen(x, &of_last(&self.cos)?)? + mul_frozen(&turned, &of_last(&self.sin)?)?
    }

    pub(super) fn angles<T: Number>(&self) -> Result<Angles<T::Compute>> {
        let wide = |tensor: &Tensor| {
            let widen = |values: &[T]| Ok(values.iter().map(|value| value.to_compute()).collect());
            with_elements(tensor, widen)
        };
        Ok(Angles {
            cos: wide(&self.cos)?,
            sin: wide(&self.sin)?,
            head_dim: self.cos.dim(D::Minus1)?,
        })
    }
}

impl<C: Real> Angles<C> {
    /// Rotates heads `[L, heads, head_dim]` of the last positions in place, in their `direction`.
    pub(super) fn rotate(&self, x: &mut [C], heads: usize, direction: Direction) {
        let (dim, heads) = (self.head_dim.max(1), heads.max(1));
        let others = self.cos.len().saturating_sub(x.len() / heads);
        let of_last = |table: &'_ [C]| others.min(table.len())..table.len();
        let (cos, sin) = (&self.cos[of_last(&self.cos)], &self.sin[of_last(&self.sin)]);
        let angles = cos.chunks_exact(dim).zip(sin.chunks_exact(dim));
        for (x, (cos, sin)) in x.chunks_exact_mut(heads * dim).zip(angles) {
            let ((cos, cos_far), (sin, sin_far)) = (cos.split_at(dim / 2), sin.split_at(dim / 2));
            for head in x.chunks_exact_mut(dim) {
                let (near, far) = head.split_at_mut(dim / 2);
                for at in 0..near.len() {
                    let (x, y) = (near[at], far[at]);
                    (near[at], far[at]) = match direction {
                        Direction::Forward => (x * cos[at] - y * sin[at], y * cos_far[at] + x * sin_far[at]),
                        Direction::Gradient => (x * cos[at] + y * sin_far[at], y * cos_far[at] - x * sin[at]),
                    };
                }
            }
        }
    }
}

/// Whether heads are rotated, or gradients of rotated heads brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Gradient,
}

//! The loss of one row of logits, and its gradient.

use num_traits::Float;

use super::cap::Cap;
use super::exponential::{exp, replace_by_exp, sum_of_exp};
use crate::Element;

/// Values side by side in a search: one comparison serves them all where the processor can.
const LANES: usize = 16;

/// A row of logits, capped, and what its softmax needs.
pub(super) struct Row<'a, C> {
    logits: &'a mut [C],
    target: usize,
    cap: Cap<C>,
    highest: C,
}

impl<'a, C: Float + Element> Row<'a, C> {
    /// Caps the logits in place. `target` must be below their number.
    pub(super) fn new(logits: &'a mut [C], target: usize, cap: Cap<C>) -> Self {
        cap.apply(logits);
        let highest = highest(logits);
        Self {
            logits,
            target,
            cap,
            highest,
        }
    }

    /// `log(sum(exp(logits))) - logits[target]`.
    pub(super) fn loss(self) -> f64 {
        self.loss_of(sum_of_exp(self.logits, self.highest))
    }

    /// Replaces the logits by the gradient of `factor` times the loss, which is returned without the factor.
    pub(super) fn differentiate(self, factor: f64) -> f64 {
        let highest = self.highest;
        let whole = C::from_f64(factor);
        if self.cap.is_none() {
            let target = self.logits[self.target];
            let sum = replace_by_exp(self.logits, highest);
            let share = C::from_f64(factor / sum);
            for x in &mut *self.logits {
                *x = *x * share;
            }
            self.logits[self.target] = self.logits[self.target] - whole;
            return sum.ln() - (target - highest).to_f64();
        }
        let sum = sum_of_exp(self.logits, highest);
        let loss = self.loss_of(sum);
        let share = C::from_f64(factor / sum);
        let cap = self.cap;
        let of_target = cap.slope(self.logits[self.target]) * whole;
        for x in &mut *self.logits {
            *x = exp(*x - highest) * share * cap.slope(*x);
        }
        self.logits[self.target] = self.logits[self.target] - of_target;
        loss
    }

    fn loss_of(&self, sum: f64) -> f64 {
        sum.ln() - (self.logits[self.target] - self.highest).to_f64()
    }
}

/// The highest value; a NaN counts for nothing here, and makes the sum of exponentials one.
pub(super) fn highest<C: Float>(row: &[C]) -> C {
    let higher = |a: C, b: C| if b > a { b } else { a };
    let mut lanes = [C::neg_infinity(); LANES];
    let blocks = row.chunks_exact(LANES);
    let rest = blocks.remainder().iter().copied();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = higher(*lane, *x);
        }
    }
    rest.chain(lanes).fold(C::neg_infinity(), higher)
}

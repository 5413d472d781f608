//! The softmax of rows of logits that come a block of columns at a time (Milakov and Gimelshein 2018, arXiv:1805.02867).

use num_traits::Float;

use super::Softcap;
use super::cap::Cap;
use super::exponential::{exp, replace_by_exp, weigh_by_exp};
use super::row::highest;
use crate::{Element, Error, Result};

/// Log-sum-exp and softmax of rows of logits of which no more than a block of columns exists at a time.
///
/// The gradient of a row's loss over the hidden state is a sum over all columns, weighted by their softmax. It can be
/// summed while the blocks come, with weights relative to the highest logit so far: a later, higher one changes what was
/// summed by a factor.
///
/// ```
/// use trainable_tokens_core::OnlineSoftmax;
///
/// // One row; the mean of the values of its columns, weighted by the softmax of their logits.
/// let (logits, values) = ([1.0f64, 2.0, 5.0, 3.0], [10.0, 20.0, 30.0, 40.0]);
/// let mut softmax = OnlineSoftmax::new(1, None);
/// let mut sum = 0.0;
/// for (logits, values) in logits.chunks(2).zip(values.chunks(2)) {
///     let mut weights = logits.to_vec();
///     softmax.add(&mut weights, &[], |_, factor| sum *= factor)?;
///     sum += weights.iter().zip(values).map(|(weight, value)| weight * value).sum::<f64>();
/// }
/// let mean = sum * softmax.share(0, 1.0);
///
/// let exponentials = logits.map(f64::exp);
/// let weighted: f64 = exponentials.iter().zip(values).map(|(e, value)| e * value).sum();
/// assert!((mean - weighted / exponentials.iter().sum::<f64>()).abs() < 1e-12);
/// # Ok::<_, trainable_tokens_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OnlineSoftmax<C> {
    cap: Cap<C>,
    rows: Vec<Seen<C>>,
}

/// What a row's columns came to so far.
#[derive(Clone, Copy, Debug)]
struct Seen<C> {
    /// The highest capped logit.
    highest: C,
    /// The sum of `exp(y - highest)`.
    sum: f64,
}

impl<C: Float> Seen<C> {
    /// What exponents are relative to: 0 while all logits are at minus infinity, whose difference is no number.
    fn shift(self) -> C {
        if self.highest == C::neg_infinity() {
            C::zero()
        } else {
            self.highest
        }
    }
}

impl<C: Float + Element> OnlineSoftmax<C> {
    /// Rows of which no column was seen yet, and what their logits are capped by.
    pub fn new(num_rows: usize, softcap: Option<Softcap>) -> Self {
        let none = Seen {
            highest: C::neg_infinity(),
            sum: 0.0,
        };
        Self {
            cap: Cap::new(softcap),
            rows: vec![none; num_rows],
        }
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Adds a block of columns: `logits` `[rows, width]`, row-major.
    ///
    /// Each becomes its weight: its exponential relative to the row's highest logit so far, times the derivative of the
    /// softcap. The columns `absent` of the block do not count: their weights are 0. What was summed for a row with earlier
    /// weights must be multiplied by the factor that `rescale` is called with, after the row's number; it is not called
    /// for a factor of 1.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the logits are not as many for each row.
    ///
    /// # Panics
    ///
    /// If an absent column is outside of the block.
    pub fn add(
        &mut self,
        logits: &mut [C],
        absent: &[usize],
        mut rescale: impl FnMut(usize, C),
    ) -> Result<()> {
        let width = logits.len() / self.rows.len().max(1);
        if width * self.rows.len() != logits.len() {
            let expected = [self.rows.len(), width];
            return Err(Error::shape("a block of logits", &expected, &[logits.len()]));
        }
        if width == 0 {
            return Ok(());
        }
        let cap = self.cap;
        for (at, (row, seen)) in logits.chunks_exact_mut(width).zip(&mut self.rows).enumerate() {
            cap.apply(row);
            absent.iter().for_each(|column| row[*column] = C::neg_infinity());
            let highest = highest(row);
            if highest > seen.highest {
                let factor = exp(seen.highest - highest);
                seen.highest = highest;
                seen.sum *= factor.to_f64();
                rescale(at, factor);
            }
            let shift = seen.shift();
            seen.sum += if cap.is_none() {
                replace_by_exp(row, shift)
            } else {
                weigh_by_exp(row, shift, |y| cap.slope(y))
            };
            absent.iter().for_each(|column| row[*column] = C::zero());
        }
        Ok(())
    }

    /// Adds the columns of another one, of as many rows. For each row `rescale` is called with its number, the factor of
    /// what was summed here, and that of what was summed there.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the other one has more or fewer rows.
    pub fn merge(&mut self, other: &Self, mut rescale: impl FnMut(usize, [C; 2])) -> Result<()> {
        if self.rows.len() != other.rows.len() {
            let (expected, got) = (self.rows.len(), other.rows.len());
            return Err(Error::shape("rows of a softmax", &[expected], &[got]));
        }
        for (at, (row, other)) in self.rows.iter_mut().zip(&other.rows).enumerate() {
            let highest = if other.highest > row.highest {
                other.highest
            } else {
                row.highest
            };
            let factor = |seen: &Seen<C>| {
                if seen.highest == highest {
                    C::one()
                } else {
                    exp(seen.highest - highest)
                }
            };
            let factors = [factor(row), factor(other)];
            let [own, others] = factors.map(Element::to_f64);
            row.sum = row.sum * own + other.sum * others;
            row.highest = highest;
            rescale(at, factors);
        }
        Ok(())
    }

    /// The cross-entropy of a row for a label whose logit, not capped, is `logit`.
    ///
    /// # Panics
    ///
    /// If there is no such row, as do the other functions of rows.
    pub fn loss(&self, row: usize, logit: C) -> f64 {
        let seen = self.rows[row];
        seen.sum.ln() - (self.cap.of(logit) - seen.highest).to_f64()
    }

    /// What the weights of a row are multiplied by to be the gradient of `factor` times its log-sum-exp.
    pub fn share(&self, row: usize, factor: f64) -> C {
        C::from_f64(factor / self.rows[row].sum)
    }

    /// The weight of a column of a row whose logit, not capped, is `logit`: relative to the row's highest of all.
    pub fn weight(&self, row: usize, logit: C) -> C {
        let y = self.cap.of(logit);
        exp(y - self.rows[row].shift()) * self.cap.slope(y)
    }

    /// The derivative of the softcap at `logit`: 1 if there is none.
    pub fn slope(&self, logit: C) -> C {
        self.cap.slope(self.cap.of(logit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f64> {
        let value = |i: u32| (f64::from(i * 37) * 0.7713).sin() * 9.0;
        (0u32..).take(len).map(value).collect()
    }

    /// `log(sum(exp(y)))` and its derivatives.
    fn dense(row: &[f64], cap: Cap<f64>) -> (f64, Vec<f64>) {
        let sum: f64 = row.iter().map(|x| cap.of(*x).exp()).sum();
        let gradient = row.iter().map(|x| cap.of(*x).exp() / sum * cap.slope(cap.of(*x)));
        (sum.ln(), gradient.collect())
    }

    #[test]
    fn blocks_come_to_the_whole() {
        let (rows, v) = (3, 40);
        let logits = noise(rows * v);
        for softcap in [None, Some(Softcap::new(4.0).unwrap())] {
            for width in [1, 7, 40] {
                // Two halves, each in blocks, with sums of the columns' numbers.
                let mut halves: Vec<_> = (0..2)
                    .map(|_| (OnlineSoftmax::new(rows, softcap), vec![0.0; rows]))
                    .collect();
                for start in (0..v).step_by(width) {
                    let (softmax, sums) = &mut halves[usize::from(start >= 14)];
                    let width = width.min(v - start);
                    let mut block: Vec<f64> = logits
                        .chunks(v)
                        .flat_map(|row| row[start..start + width].to_vec())
                        .collect();
                    softmax
                        .add(&mut block, &[], |row, factor| sums[row] *= factor)
                        .unwrap();
                    for (sum, weights) in sums.iter_mut().zip(block.chunks(width)) {
                        for (column, weight) in (start..).zip(weights) {
                            *sum += weight * column as f64;
                        }
                    }
                }
                let (other, others) = halves.pop().unwrap();
                let (mut softmax, mut sums) = halves.pop().unwrap();
                softmax
                    .merge(&other, |row, [own, there]| {
                        sums[row] = sums[row] * own + others[row] * there;
                    })
                    .unwrap();
                for (row, logits) in logits.chunks(v).enumerate() {
                    let (log_sum, gradient) = dense(logits, Cap::new(softcap));
                    let want: f64 = gradient.iter().enumerate().map(|(i, g)| g * i as f64).sum();
                    let got = sums[row] * softmax.share(row, 1.0);
                    assert!((got - want).abs() < 1e-12 * want.abs(), "{got} {want}");
                    let loss = softmax.loss(row, logits[5]);
                    let want = log_sum - Cap::new(softcap).of(logits[5]);
                    assert!((loss - want).abs() < 1e-12, "{loss} {want}");
                    let got = softmax.weight(row, logits[6]) * softmax.share(row, 1.0);
                    assert!((got - gradient[6]).abs() < 1e-14, "{got} {}", gradient[6]);
                }
            }
        }
    }

    #[test]
    fn absent_columns_do_not_count() {
        for softcap in [None, Some(Softcap::new(4.0).unwrap())] {
            let mut with = OnlineSoftmax::new(2, softcap);
            let mut block = [1.0, 9.0, 2.0, 3.0, f64::NAN, 4.0];
            with.add(&mut block, &[1], |_, _| {}).unwrap();
            let mut without = OnlineSoftmax::new(2, softcap);
            let mut others = [1.0, 2.0, 3.0, 4.0];
            without.add(&mut others, &[], |_, _| {}).unwrap();
            assert_eq!(block, [others[0], 0.0, others[1], others[2], 0.0, others[3]]);
            for row in [0, 1] {
                assert_eq!(with.loss(row, 2.5), without.loss(row, 2.5));
            }
        }
    }

    #[test]
    fn infinities_and_nan_come_through() {
        let low = f32::NEG_INFINITY;
        let mut softmax = OnlineSoftmax::new(2, None);
        let mut block = [low, low, low, 1.0];
        softmax.add(&mut block, &[], |_, _| {}).unwrap();
        assert_eq!(block, [0.0, 0.0, 0.0, 1.0]);
        let nothing: OnlineSoftmax<f32> = OnlineSoftmax::new(2, None);
        softmax.merge(&nothing, |_, _| {}).unwrap();
        let mut block = [2.0, low];
        softmax
            .add(&mut block, &[], |row, factor| assert_eq!((row, factor), (0, 0.0)))
            .unwrap();
        assert_eq!((softmax.loss(0, 2.0), softmax.loss(1, 1.0)), (0.0, 0.0));
        softmax.add(&mut [f32::NAN, 0.0], &[], |_, _| {}).unwrap();
        assert!(softmax.loss(0, 2.0).is_nan() && softmax.loss(1, 1.0) > 0.0);
        let mut only_nan = OnlineSoftmax::new(1, None);
        only_nan.add(&mut [f32::NAN, low], &[], |_, _| {}).unwrap();
        assert!(only_nan.loss(0, 0.0).is_nan());
    }

    #[test]
    fn shapes_are_checked() {
        let mut softmax = OnlineSoftmax::new(2, None);
        let error = softmax.add(&mut [0f32; 3], &[], |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("a block of logits"), "{error}");
        softmax.add(&mut [0f32; 0], &[], |_, _| {}).unwrap();
        let other = OnlineSoftmax::new(3, None);
        assert!(softmax.merge(&other, |_, _| {}).is_err());
    }
}

//! Matrix products into memory that is there already, on the CPU; candle's own always allocate their result.

use std::ops::Range;

use candle_core::{Result, bail};
use gemm::Parallelism;
use trainable_tokens_core::{DType, Element};

/// A matrix in a slice.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, C> {
    values: &'a [C],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a, C: Element> Matrix<'a, C> {
    /// Rows of `columns` elements, one after the other.
    pub fn new(values: &'a [C], [rows, columns]: [usize; 2]) -> Self {
        Self {
            values,
            shape: [rows, columns],
            strides: [columns, 1],
        }
    }

    /// Rows that begin `stride` elements apart.
    #[must_use]
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.strides[0] = stride;
        self
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// How many columns there are.
    pub fn columns(&self) -> usize {
        self.shape[1]
    }

    /// Some of the columns.
    fn columns_of(self, range: Range<usize>) -> Self {
        self.transposed().rows_of(range).transposed()
    }

    /// Some of the rows, of which there is one at least.
    fn rows_of(self, range: Range<usize>) -> Self {
        Self {
            values: &self.values[range.start * self.strides[0]..],
            shape: [range.len(), self.shape[1]],
            strides: self.strides,
        }
    }

    /// The same values, rows as columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        Self {
            values: self.values,
            shape: [columns, rows],
            strides: [column, row],
        }
    }
}

/// What becomes of the values that a product is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Old {
    /// They are overwritten.
    Replace,
    /// The product is added to them.
    Add,
}

/// The shortest inner size of a product that is summed in parts, and how often it is longer than the result is wide or high.
const LONG: (usize, usize) = (1 << 14, 16);
/// Of how many parts such a product is the sum, however many threads there are: sums have the same bits on every machine.
const PARTS: usize = 8;

/// `out = factor · left · right`, or `out += factor · left · right`, on at most `threads` threads, for rows of `out` that
/// begin `stride` elements apart; in `f32` or `f64`.
///
/// Where the inner size is far larger than the result, as in the gradient of hidden states over a vocabulary, threads that
/// share the result wait for each other at every step of the sum: there each sums a part of it for itself, into memory of up
/// to eight results.
///
/// # Errors
///
/// For matrices that do not fit, and for other types.
pub fn multiply<C: Element>(
    left: Matrix<'_, C>,
    right: Matrix<'_, C>,
    factor: C,
    (old, out, stride): (Old, &mut [C], usize),
    threads: usize,
) -> Result<()> {
    let ([m, k], [inner, n]) = (left.shape, right.shape);
    if k != inner || n > stride || !matches!(C::DTYPE, DType::F32 | DType::F64) {
        bail!(
            "a product of {:?} and {:?} in {}",
            left.shape,
            right.shape,
            C::DTYPE
        );
    }
    let len = |[rows, columns]: [usize; 2], [row, column]: [usize; 2]| {
        // One past the last element.
        if rows == 0 || columns == 0 {
            return Some(0);
        }
        let last = (rows - 1)
            .checked_mul(row)?
            .checked_add((columns - 1).checked_mul(column)?)?;
        last.checked_add(1)
    };
    let fits = |len: Option<usize>, values: usize| len.is_some_and(|len| len <= values);
    if !fits(len(left.shape, left.strides), left.values.len())
        || !fits(len(right.shape, right.strides), right.values.len())
        || !fits(len([m, n], [stride, 1]), out.len())
    {
        bail!(
            "a product of {:?} and {:?} outside of its memory",
            left.shape,
            right.shape
        );
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        if old == Old::Replace {
            let rows = out.chunks_mut(stride).take(m);
            rows.for_each(|row| row[..n].fill(C::default()));
        }
        return Ok(());
    }
    if k < LONG.0 || k / LONG.1 < m.max(n) {
        product(left, right, factor, (old, out, stride), threads);
        return Ok(());
    }
    let mut sums = vec![C::default(); PARTS * m * n];
    let mut jobs: Vec<_> = sums.chunks_exact_mut(m * n).enumerate().collect();
    let (jobs_of_a_thread, threads_of_a_job) = (PARTS.div_ceil(threads.max(1)), threads / PARTS);
    rayon::scope(|scope| {
        for jobs in jobs.chunks_mut(jobs_of_a_thread) {
            scope.spawn(move |_| {
                for (part, sums) in jobs {
                    let range = *part * k / PARTS..(*part + 1) * k / PARTS;
                    let (left, right) = (left.columns_of(range.clone()), right.rows_of(range));
                    product(left, right, factor, (Old::Replace, sums, n), threads_of_a_job);
                }
            });
        }
    });
    for (at, part) in sums.chunks_exact(m * n).enumerate() {
        for (to, from) in out.chunks_mut(stride).zip(part.chunks_exact(n)) {
            let add = old == Old::Add || at > 0;
            let each = to.iter_mut().zip(from);
            each.for_each(|(to, x)| {
                *to = if add {
                    C::from_compute(to.to_compute() + x.to_compute())
                } else {
                    *x
                }
            });
        }
    }
    Ok(())
}

/// The product, of matrices that were checked.
fn product<C: Element>(
    left: Matrix<'_, C>,
    right: Matrix<'_, C>,
    factor: C,
    (old, out, stride): (Old, &mut [C], usize),
    threads: usize,
) {
    let ([m, k], n) = (left.shape, right.shape[1]);
    let parallelism = if threads > 1 {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    let one = C::from_f64(1.0);
    let [left_rows, left_columns] = left.strides.map(usize::cast_signed);
    let [right_rows, right_columns] = right.strides.map(usize::cast_signed);
    #[expect(unsafe_code, reason = "the product takes pointers")]
    // SAFETY: `multiply` checked all of it, and hands on matrices or parts of them: `C` is f32 or f64, which `gemm` knows.
    // Every element at `row * row stride + column * column stride` lies in the slices, by the check of the last one of each; `out` is borrowed exclusively, and its rows do not overlap since
    // `n <= stride`. Lengths of slices fit an `isize`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride.cast_signed(),
            old == Old::Add,
            left.values.as_ptr(),
            left_columns,
            left_rows,
            right.values.as_ptr(),
            right_columns,
            right_rows,
            one,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f64> {
        let value = |i: u32| f64::from((i * 31 + seed) % 17) - 8.0;
        (0u32..).take(len).map(value).collect()
    }

    #[test]
    fn products_are_those_of_the_definition() {
        for [m, k, n] in [
            [1, 1, 1],
            [5, 3, 7],
            [4, 0, 2],
            [0, 3, 2],
            [3, 2, 0],
            [33, 65, 40],
            [3, LONG.0 + 5, 4],
        ] {
            for stride in [n, n + 3] {
                for old in [Old::Replace, Old::Add] {
                    let (a, b) = (values(m * k, 1), values(n * k, 2));
                    let before = values((m * stride).saturating_sub(stride - n), 3);
                    let mut got = before.clone();
                    let (left, right) = (Matrix::new(&a, [m, k]), Matrix::new(&b, [n, k]));
                    multiply(left, right.transposed(), 0.5, (old, &mut got, stride), 2).unwrap();
                    let mut want = before;
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|at| 0.5 * a[i * k + at] * b[j * k + at]).sum();
                            let to = &mut want[i * stride + j];
                            *to = if old == Old::Add { *to + sum } else { sum };
                        }
                    }
                    assert_eq!(got, want, "{m} {k} {n} {stride} {old:?}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let a = values(6, 1);
        let new = |columns| Matrix::new(&a, [6 / columns, columns]);
        let mut out = vec![0.0; 4];
        let mut refused = |a, b, stride| multiply(a, b, 1.0, (Old::Replace, &mut out, stride), 1).is_err();
        assert!(refused(new(3), new(3), 3), "inner sizes");
        assert!(refused(new(3), new(3).transposed(), 1), "overlapping rows");
        assert!(refused(new(3), new(3).transposed(), 3), "a short result");
        assert!(
            refused(new(3).with_stride(4), new(3).transposed(), 2),
            "a short input"
        );
        assert!(!refused(new(3), new(3).transposed(), 2));
        let half = [half::f16::ONE];
        let (one, mut out) = (Matrix::new(&half, [1, 1]), half);
        assert!(
            multiply(one, one, half[0], (Old::Replace, &mut out, 1), 1).is_err(),
            "another type"
        );
    }
}

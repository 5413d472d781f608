//! Products of matrices that lie in slices, on the CPU.

use candle_core::{Result, bail};
use gemm::Parallelism;

use super::storage::Real;

/// A matrix in a slice, row after row, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a, C> {
    /// At least `rows * columns` of them.
    values: &'a [C],
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl<'a, C> Matrix<'a, C> {
    /// As many rows of `width` as there are.
    pub(super) fn new(values: &'a [C], width: usize) -> Self {
        Self {
            values,
            rows: values.len().checked_div(width).unwrap_or(0),
            columns: width,
            is_transposed: false,
        }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            is_transposed: !self.is_transposed,
            ..self
        }
    }

    /// How far the next column and the next row are.
    fn strides(&self) -> (isize, isize) {
        // A slice has no more than `isize::MAX` elements.
        let stride = |length: usize| isize::try_from(length).unwrap_or(isize::MAX);
        if self.is_transposed {
            (stride(self.rows), 1)
        } else {
            (1, stride(self.columns))
        }
    }
}

/// What becomes of the numbers that lie where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Old {
    Overwrite,
    Add,
}

/// Writes `factor * left * right` to `out`, row after row, on at most `threads` threads.
pub(super) fn multiply<C: Real>(
    (out, old): (&mut [C], Old),
    left: Matrix<'_, C>,
    right: Matrix<'_, C>,
    factor: C,
    threads: usize,
) -> Result<()> {
    let (m, k, n) = (left.rows, left.columns, right.columns);
    if right.rows != k || out.len() != m * n {
        let (depth, len) = (right.rows, out.len());
        bail!("the product of {m} x {k} and {depth} x {n} does not fit {len} numbers");
    }
    if k == 0 && old == Old::Overwrite {
        out.fill(C::zero());
    }
    if m == 0 || n == 0 || k == 0 {
        return Ok(());
    }
    let (left_column, left_row) = left.strides();
    let (right_column, right_row) = right.strides();
    let (out_column, out_row) = Matrix::new(out, n).strides();
    let kept = if old == Old::Add { C::one() } else { C::zero() };
    let parallelism = if threads > 1 {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    // SAFETY: `left` and `right` borrow as many numbers as their rows, columns and strides span, and `out`, borrowed
    // alone, has those of an `m x n` matrix, all initialized; the type is one of those that implement `Real`, `f32` and
    // `f64`, which gemm has kernels for.
    #[expect(
        unsafe_code,
        reason = "gemm takes pointers; candle's product would copy the result"
    )]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            out_column,
            out_row,
            old == Old::Add,
            left.values.as_ptr(),
            left_column,
            left_row,
            right.values.as_ptr(),
            right_column,
            right_row,
            kept,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
    Ok(())
}

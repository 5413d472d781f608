//! A check that the framework's gradient is the slope of the loss.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainable_tokens_core::TokenRows;

use crate::{Error, Result};

/// Directions that are compared.
const DIRECTIONS: usize = 4;
/// The length of a nudge of a row, relative to the row's norm.
const NUDGE: f64 = 0.02;
/// Rows of an embedding that are shorter than this are nudged as if they were this long. A norm behind the embedding turns
/// sharply at a row of zeros: a nudge must be small against the root of its epsilon.
pub(crate) const SHORTEST_ROW: f64 = 1e-3;
/// The same for the rows of LoRA's factors, of which one starts at zero: a nudge must be seen behind them.
pub(crate) const SHORTEST_FACTOR: f64 = 1.0;
/// The largest relative error of a sound gradient. A cut graph gives 0.5 and more.
const TOLERANCE: f64 = 0.1;

/// What [`check_gradient`] saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradientCheck {
    /// Root mean square of (derivative - finite difference), relative to that of the finite differences.
    pub relative_error: f64,
    /// The part of `relative_error` that rounding of the loss and its curvature explain.
    pub uncertainty: f64,
}

/// Compares directional derivatives of the `gradients` of matrices with central finite differences of the loss, in random
/// directions that nudge each row of each of them in proportion to its norm, or to `shortest` where that is more. Frameworks can cut a graph in silence, and the
/// loss may still fall with what is left.
///
/// Each difference is taken at two step lengths; how far they lie apart, and the rounding of the loss, is the
/// uncertainty that an honest gradient is granted.
///
/// # Errors
///
/// [`Error::GradientMismatch`] if they disagree by more than 0.1 beyond the uncertainty; those of `loss_at`.
pub fn check_gradient(
    matrices: &[TokenRows],
    gradients: &[TokenRows],
    shortest: f64,
    seed: u64,
    loss_precision: f64,
    mut loss_at: impl FnMut(&[TokenRows]) -> Result<f64>,
) -> Result<GradientCheck> {
    if matrices.iter().all(|rows| rows.data().is_empty()) {
        return Ok(GradientCheck::default());
    }
    let flat = |matrices: &[TokenRows]| {
        matrices
            .iter()
            .flat_map(TokenRows::to_f64_vec)
            .collect::<Vec<_>>()
    };
    let (start, slope) = (flat(matrices), flat(gradients));
    let rows = matrices.iter().flat_map(|rows| {
        let dim = rows.embedding_dim();
        rows.row_norms()
            .into_iter()
            .map(move |norm| (norm.max(shortest), dim))
    });
    let scales: Vec<(f64, usize)> = rows.collect();
    let length = NUDGE * scales.iter().map(|(scale, _)| scale * scale).sum::<f64>().sqrt();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut error, mut doubt, mut size) = (0.0, 0.0, 0.0);
    for _ in 0..DIRECTIONS {
        let per_element = scales
            .iter()
            .flat_map(|(scale, dim)| std::iter::repeat_n(scale, *dim));
        let direction: Vec<f64> = per_element
            .map(|scale| scale * random.random_range(-1.0..1.0))
            .collect();
        let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
        let derivative = direction.iter().zip(&slope).map(|(d, g)| d * g).sum::<f64>() / norm;
        let mut loss = |by: f64| {
            let mut nudged = start.iter().zip(&direction).map(|(x, d)| x + by * d / norm);
            let nudged = matrices.iter().map(|rows| {
                let [k, dim] = rows.shape();
                let values = nudged.by_ref().take(k * dim).collect();
                Ok(TokenRows::new::<f64>(values, k, dim)?.to_dtype(rows.dtype()))
            });
            loss_at(&nudged.collect::<Result<Vec<_>>>()?)
        };
        let (near, far) = (
            (loss(length)?, loss(-length)?),
            (loss(2.0 * length)?, loss(-2.0 * length)?),
        );
        let near_slope = (near.0 - near.1) / (2.0 * length);
        let far_slope = (far.0 - far.1) / (4.0 * length);
        // Richardson's extrapolation removes the quadratic error of the central difference.
        let difference = (4.0 * near_slope - far_slope) / 3.0;
        let rounding = loss_precision * near.0.abs() / length;
        error += (derivative - difference).powi(2);
        doubt += (near_slope - far_slope).powi(2) + rounding.powi(2);
        size += difference.powi(2);
    }
    let scale = size.sqrt().max(f64::MIN_POSITIVE);
    let check = GradientCheck {
        relative_error: error.sqrt() / scale,
        uncertainty: doubt.sqrt() / scale,
    };
    // False for a loss that is not a number, which is a mismatch too.
    let agrees = error.sqrt() <= TOLERANCE * size.sqrt() + doubt.sqrt();
    if !agrees {
        return Err(Error::GradientMismatch {
            relative_error: check.relative_error,
            directions: DIRECTIONS,
            tolerance: TOLERANCE,
        });
    }
    Ok(check)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn rows(values: &[f32]) -> TokenRows {
        TokenRows::new(values.to_vec(), values.len() / 2, 2).unwrap()
    }

    /// The first row apart from the others: two matrices in the place of one.
    fn split(rows: &TokenRows) -> [TokenRows; 2] {
        let values = rows.to_f64_vec();
        let part = |values: &[f64]| TokenRows::new(values.to_vec(), values.len() / 2, 2).unwrap();
        let (first, others) = values.split_at(2);
        [part(first), part(others)].map(|part| part.to_dtype(rows.dtype()))
    }

    /// `sum(sin(x_i) * (i + 1))`
    fn loss(matrices: &[TokenRows]) -> f64 {
        (1..)
            .zip(matrices.iter().flat_map(TokenRows::to_f64_vec))
            .map(|(i, x)| f64::from(i) * x.sin())
            .sum()
    }

    fn slope(rows: &TokenRows, only: usize) -> TokenRows {
        let each = (1..).zip(rows.to_f64_vec()).map(|(i, x)| f64::from(i) * x.cos());
        let kept = each
            .enumerate()
            .map(|(at, g)| if at < only { g } else { 0.0 })
            .collect();
        TokenRows::new::<f64>(kept, rows.num_rows(), 2)
            .unwrap()
            .to_dtype(rows.dtype())
    }

    #[test]
    fn the_true_gradient_passes_and_a_part_of_it_does_not() {
        let at = rows(&[0.3, -1.0, 0.7, 0.1, 1.1, -0.4]);
        let check = |gradient: &TokenRows| {
            let whole = check_gradient(from_ref(&at), from_ref(gradient), SHORTEST_ROW, 1, 1e-7, |rows| {
                Ok(loss(rows))
            });
            let parts = check_gradient(&split(&at), &split(gradient), SHORTEST_ROW, 1, 1e-7, |rows| {
                Ok(loss(rows))
            });
            assert_eq!(format!("{whole:?}"), format!("{parts:?}"));
            whole
        };
        let true_one = check(&slope(&at, 6)).unwrap();
        assert!(true_one.relative_error < 0.01, "{true_one:?}");
        for kept in 0..6 {
            let error = check(&slope(&at, kept)).unwrap_err();
            assert!(matches!(error, Error::GradientMismatch { .. }), "{kept}: {error}");
        }
    }

    #[test]
    fn a_row_of_zeros_before_a_norm_passes() {
        // `sum((i + 1) * x_i / sqrt(|x|^2 + 1e-6))` over rows of two, and its slope.
        let loss = |rows: &[TokenRows]| -> f64 {
            let row = |x: &[f64]| (x[0] + 2.0 * x[1]) / (x[0] * x[0] + x[1] * x[1] + 1e-6).sqrt();
            rows[0].to_f64_vec().chunks(2).map(row).sum()
        };
        let at = rows(&[0.3, -1.0, 0.0, 0.0]);
        let square: f64 = 0.3 * 0.3 + 1.0 + 1e-6;
        let (size, value) = (square.sqrt(), 0.3 - 2.0);
        let slope = [
            1.0 / size - value * 0.3 / (square * size),
            2.0 / size + value / (square * size),
            1e3,
            2e3,
        ];
        let check = |slope: [f64; 4]| {
            let gradient = TokenRows::new(slope.to_vec(), 2, 2).unwrap();
            check_gradient(from_ref(&at), &[gradient], SHORTEST_ROW, 1, 1e-7, |rows| {
                Ok(loss(rows))
            })
        };
        let whole = check(slope).unwrap();
        assert!(whole.relative_error < 0.01, "{whole:?}");
        for cut in [[0.0, 0.0, 1e3, 2e3], [slope[0], slope[1], 0.0, 0.0]] {
            assert!(check(cut).is_err());
        }
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_refused() {
        let at = rows(&[0.3, -1.0]);
        let gradient = slope(&at, 2);
        assert!(check_gradient(&[at], &[gradient], SHORTEST_ROW, 1, 1e-7, |_| Ok(f64::NAN)).is_err());
    }
}

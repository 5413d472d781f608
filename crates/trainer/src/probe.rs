//! A check that the framework's gradient is the slope of the loss.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainable_tokens_core::TokenRows;

use crate::{Error, Result};

/// Directions that are compared.
const DIRECTIONS: usize = 4;
/// The length of a nudge, relative to the norm of all rows.
const NUDGE: f64 = 0.02;
/// The largest relative error of a sound gradient. A cut graph gives 0.5 and more.
const TOLERANCE: f64 = 0.1;

/// What [`check_gradient`] saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradientCheck {
    /// Root mean square of (derivative - finite difference), relative to that of the finite differences.
    pub relative_error: f64,
    /// The part of `relative_error` that rounding of the loss and its curvature explain.
    pub uncertainty: f64,
}

/// Compares directional derivatives of `gradient`, `[k, D]` at `rows`, with central finite differences of the loss,
/// in random directions. Frameworks can cut a graph in silence, and the loss may still fall with what is left.
///
/// Each difference is taken at two step lengths; how far they lie apart, and the rounding of the loss, is the
/// uncertainty that an honest gradient is granted.
///
/// # Errors
///
/// [`Error::GradientMismatch`] if they disagree by more than 0.1 beyond the uncertainty; those of `loss_at`.
pub fn check_gradient(
    rows: &TokenRows,
    gradient: &TokenRows,
    seed: u64,
    loss_precision: f64,
    mut loss_at: impl FnMut(&TokenRows) -> Result<f64>,
) -> Result<GradientCheck> {
    let [k, dim] = rows.shape();
    if rows.data().is_empty() {
        return Ok(GradientCheck {
            relative_error: 0.0,
            uncertainty: 0.0,
        });
    }
    let (start, slope) = (rows.to_f64_vec(), gradient.to_f64_vec());
    let length = NUDGE * rows.norm().max(1e-3);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut error, mut doubt, mut size) = (0.0, 0.0, 0.0);
    for _ in 0..DIRECTIONS {
        let direction: Vec<f64> = start.iter().map(|_| random.random_range(-1.0..1.0)).collect();
        let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
        let derivative = direction.iter().zip(&slope).map(|(d, g)| d * g).sum::<f64>() / norm;
        let mut loss = |by: f64| {
            let nudged = start
                .iter()
                .zip(&direction)
                .map(|(x, d)| x + by * d / norm)
                .collect();
            loss_at(&TokenRows::new::<f64>(nudged, k, dim)?.to_dtype(rows.dtype()))
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
    use super::*;

    fn rows(values: &[f32]) -> TokenRows {
        TokenRows::new(values.to_vec(), values.len() / 2, 2).unwrap()
    }

    /// `sum(sin(x_i) * (i + 1))`
    fn loss(rows: &TokenRows) -> f64 {
        (1..)
            .zip(rows.to_f64_vec())
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
        let check = check_gradient(&at, &slope(&at, 6), 1, 1e-7, |rows| Ok(loss(rows))).unwrap();
        assert!(check.relative_error < 0.01, "{check:?}");
        for kept in 0..6 {
            let error = check_gradient(&at, &slope(&at, kept), 1, 1e-7, |rows| Ok(loss(rows))).unwrap_err();
            assert!(matches!(error, Error::GradientMismatch { .. }), "{kept}: {error}");
        }
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_refused() {
        let at = rows(&[0.3, -1.0]);
        assert!(check_gradient(&at, &slope(&at, 2), 1, 1e-7, |_| Ok(f64::NAN)).is_err());
    }
}

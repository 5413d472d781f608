//! Norms of rows, kept after each update.

use crate::rows::with_data;
use crate::{Element, Error, OptimizerHook, Result, StepContext, TokenRows};

/// Scales each row that has become longer than an L2 norm down to it, after each update.
#[derive(Clone, Copy, Debug)]
pub struct ClampRowNorm {
    max_norm: f64,
}

impl ClampRowNorm {
    /// Clamps to `max_norm`.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless `max_norm` is a finite number above 0.
    pub fn new(max_norm: f64) -> Result<Self> {
        let max_norm = positive("max_norm", max_norm)?;
        Ok(Self { max_norm })
    }
}

impl OptimizerHook for ClampRowNorm {
    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        scale_rows(context.rows, |_, norm| self.max_norm.min(norm));
        Ok(())
    }
}

/// Scales each row to an L2 norm of its own, after each update: training turns it, and its length stays.
///
/// A row of zeros, or one that is not finite, stays as it is.
#[derive(Clone, Debug)]
pub struct MatchRowNorm {
    norms: Vec<f64>,
}

impl MatchRowNorm {
    /// Matches `norms`, one for each row in slot order.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless all are finite numbers above 0.
    pub fn new(norms: Vec<f64>) -> Result<Self> {
        for norm in &norms {
            positive("norm", *norm)?;
        }
        Ok(Self { norms })
    }
}

impl OptimizerHook for MatchRowNorm {
    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        context.rows.expect_shape(
            "rows to match norms",
            self.norms.len(),
            context.rows.embedding_dim(),
        )?;
        scale_rows(context.rows, |row, _| self.norms[row]);
        Ok(())
    }
}

fn positive(name: &'static str, value: f64) -> Result<f64> {
    if value > 0.0 && value.is_finite() {
        return Ok(value);
    }
    Err(Error::Hyperparameter {
        name,
        value,
        must: "above 0 and finite",
    })
}

/// Scales each row to the norm that `target` tells for it and its norm; each element is computed in `f64` and rounded once.
fn scale_rows(rows: &mut TokenRows, target: impl Fn(usize, f64) -> f64) {
    let factors: Vec<f64> = (0..)
        .zip(rows.row_norms())
        .map(|(row, norm)| match target(row, norm) / norm {
            factor if factor.is_finite() && norm.is_finite() => factor,
            _ => 1.0,
        })
        .collect();
    let dim = rows.embedding_dim().max(1);
    with_data!(rows.data_mut(), values => scale_each(values, dim, &factors));
}

fn scale_each<T: Element>(values: &mut [T], dim: usize, factors: &[f64]) {
    for (row, factor) in values.chunks_exact_mut(dim).zip(factors) {
        // A row that stays keeps its bits.
        if *factor != 1.0 {
            row.iter_mut().for_each(|x| *x = T::from_f64(x.to_f64() * factor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sgd, SgdConfig, TokenSet, step_rows};

    fn after(hook: &mut dyn OptimizerHook, rows: &[f32]) -> Result<TokenRows> {
        let mut rows = TokenRows::new(rows.to_vec(), rows.len() / 2, 2)?;
        let tokens = TokenSet::new((0..).take(rows.num_rows()), 9)?;
        let mut sgd = Sgd::new(SgdConfig::default())?;
        let mut gradient = TokenRows::zeros(rows.dtype(), rows.num_rows(), 2);
        step_rows(&mut sgd, &mut [hook], &tokens, &mut rows, &mut gradient)?;
        Ok(rows)
    }

    #[test]
    fn only_longer_rows_are_clamped() {
        let mut hook = ClampRowNorm::new(5.0).unwrap();
        let rows = after(&mut hook, &[6.0, 8.0, 0.1, -0.2, 0.0, -0.0, f32::INFINITY, 1.0]).unwrap();
        let want = [3.0, 4.0, 0.1, -0.2, 0.0, -0.0, f32::INFINITY, 1.0];
        assert!(
            rows.bits_eq(&TokenRows::new(want.to_vec(), 4, 2).unwrap()),
            "{rows:?}"
        );
    }

    #[test]
    fn every_row_gets_its_norm() {
        let mut hook = MatchRowNorm::new(vec![10.0, 0.5, 1.0]).unwrap();
        let rows = after(&mut hook, &[3.0, 4.0, 6.0, -8.0, 0.0, 0.0]).unwrap();
        assert_eq!(rows.to_f32_vec(), [6.0, 8.0, 0.3, -0.4, 0.0, 0.0]);
        assert!(after(&mut hook, &[3.0, 4.0]).is_err(), "three norms for one row");
    }

    #[test]
    fn norms_are_numbers_above_zero() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(ClampRowNorm::new(bad).is_err(), "{bad}");
            assert!(MatchRowNorm::new(vec![1.0, bad]).is_err(), "{bad}");
        }
    }
}

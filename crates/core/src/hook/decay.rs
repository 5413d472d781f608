//! Decay toward the rows' original values.

use crate::rows::with_data;
use crate::{Element, Error, OptimizerHook, Result, StepContext, TokenRows};

/// Pulls each row toward where it started, by `lr * weight_decay` of the distance, before each update.
///
/// Decoupled weight decay as in AdamW, but with the original rows in the place of zero, which would pull a token
/// that is absent from the data away from the vocabulary.
#[derive(Clone, Debug)]
pub struct DecayTowardOriginal {
    weight_decay: f64,
    original: TokenRows,
}

impl DecayTowardOriginal {
    /// Decays toward `original`, `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless `weight_decay` is a number of at least 0.
    pub fn new(weight_decay: f64, original: TokenRows) -> Result<Self> {
        if weight_decay >= 0.0 && weight_decay.is_finite() {
            return Ok(Self {
                weight_decay,
                original,
            });
        }
        Err(Error::Hyperparameter {
            name: "weight_decay",
            value: weight_decay,
            must: "at least 0",
        })
    }
}

impl OptimizerHook for DecayTowardOriginal {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        let [k, dim] = context.rows.shape();
        self.original.expect_shape("original rows", k, dim)?;
        let pull = context.learning_rate * self.weight_decay;
        let original = &self.original.like_dtype(context.rows.dtype());
        with_data!(context.rows.data_mut(), rows => decay(rows, original, pull));
        Ok(())
    }
}

fn decay<T: Element>(rows: &mut [T], original: &TokenRows, pull: f64) {
    let pull = T::Compute::from_f64(pull);
    let original = original.as_slice::<T>().unwrap_or_default();
    for (row, original) in rows.iter_mut().zip(original) {
        let value = row.to_compute();
        *row = T::from_compute(value - pull * (value - original.to_compute()));
    }
}

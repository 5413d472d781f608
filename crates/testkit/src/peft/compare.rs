//! Comparing with what PEFT recorded.

use serde_json::Value;
use trainable_tokens_core::TokenRows;

use super::fixture::number;
use crate::failure::{ensure, same};
use crate::{Failure, Outcome};

/// How far a result may lie from the recorded one: `atol + rtol * |recorded|`, or not one bit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance {
    atol: f64,
    rtol: f64,
}

impl Tolerance {
    /// The same tolerance absolutely and relatively.
    pub(super) const fn both(tolerance: f64) -> Self {
        Self {
            atol: tolerance,
            rtol: tolerance,
        }
    }

    /// That of an operation.
    pub(super) fn of(operation: &Value) -> Result<Self, Failure> {
        Ok(Self {
            atol: number(operation, "atol")?,
            rtol: number(operation, "rtol")?,
        })
    }

    /// Whether `got` is `want`, within the tolerance.
    pub(super) fn check(self, what: &str, got: &TokenRows, want: &TokenRows) -> Outcome {
        if self.atol == 0.0 && self.rtol == 0.0 {
            return same(what, got, want);
        }
        ensure!(
            got.shape() == want.shape(),
            "{what}: shape {:?}, expected {:?}",
            got.shape(),
            want.shape()
        );
        for (at, (got, exact)) in got.to_f64_vec().into_iter().zip(want.to_f64_vec()).enumerate() {
            let [row, column] = [at / want.embedding_dim(), at % want.embedding_dim()];
            let allowed = self.atol + self.rtol * exact.abs();
            ensure!(
                (got - exact).abs() <= allowed,
                "{what}: row {row}, column {column} is {got}, expected {exact} within {allowed:.1e}"
            );
        }
        Ok(())
    }
}

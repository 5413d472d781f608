//! Comparing with what PEFT recorded.

use serde_json::Value;
use trainable_tokens_core::TokenRows;

use super::value::{flag, number};
use crate::failure::{ensure, same};
use crate::{Failure, Outcome};

/// How far a result may lie from the recorded one: `atol + rtol * |recorded|`, or not one bit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance {
    atol: f64,
    rtol: f64,
    nan: Nan,
}

/// What a NaN is equal to, where bits are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nan {
    /// Itself, as any other value.
    Same,
    /// Any NaN: torch's rounding to half types keeps no payload.
    Any,
}

impl Tolerance {
    /// The same tolerance absolutely and relatively.
    pub(super) const fn both(tolerance: f64) -> Self {
        Self {
            atol: tolerance,
            rtol: tolerance,
            nan: Nan::Same,
        }
    }

    /// That of an operation.
    pub(super) fn of(operation: &Value) -> Result<Self, Failure> {
        Ok(Self {
            atol: number(operation, "atol")?,
            rtol: number(operation, "rtol")?,
            nan: match operation.get("nan_equal") {
                Some(_) if flag(operation, "nan_equal")? => Nan::Any,
                _ => Nan::Same,
            },
        })
    }

    /// Whether `got` is `want`, within the tolerance.
    pub(super) fn check(self, what: &str, got: &TokenRows, want: &TokenRows) -> Outcome {
        if self.atol == 0.0 && self.rtol == 0.0 {
            return match self.nan {
                Nan::Same => same(what, got, want),
                Nan::Any => same(what, &plain_nans(got)?, &plain_nans(want)?),
            };
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

/// The same values, but every NaN has the same bits.
fn plain_nans(rows: &TokenRows) -> Result<TokenRows, Failure> {
    let size = rows.dtype().size_in_bytes();
    let mut bytes = rows.to_le_bytes();
    for (value, bytes) in rows.to_f64_vec().iter().zip(bytes.chunks_exact_mut(size)) {
        if value.is_nan() {
            bytes.fill(0xff);
        }
    }
    let [count, columns] = rows.shape();
    Ok(TokenRows::from_le_bytes(rows.dtype(), count, columns, &bytes)?)
}

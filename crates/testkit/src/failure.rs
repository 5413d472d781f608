//! Why a case fails.

use std::fmt::{Debug, Display};

use trainable_tokens_core::{BackendError, DType, ErrorKind, TokenRows};

/// The reason of a failed case. Any error turns into one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

impl Failure {
    /// A failure for `reason`.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// The reason.
    pub fn reason(&self) -> &str {
        &self.0
    }
}

impl<E: Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// What a case returns.
pub type Outcome = Result<(), Failure>;

/// Fails with a formatted reason unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err($crate::Failure::new(format!($($reason)+)));
        }
    };
}
pub(crate) use ensure;

/// How far results of arithmetic may lie from the exact ones, relative to the largest of them or to 1, whichever is
/// larger. Copies have no tolerance: they are compared bit for bit.
pub const fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
    }
}

/// Equal bits, element type and shape.
pub(crate) fn same(what: &str, got: &TokenRows, want: &TokenRows) -> Outcome {
    ensure!(
        got.shape() == want.shape(),
        "{what}: shape {:?}, expected {:?}",
        got.shape(),
        want.shape()
    );
    ensure!(
        got.dtype() == want.dtype(),
        "{what}: element type {}, expected {}",
        got.dtype(),
        want.dtype()
    );
    if got.bits_eq(want) {
        return Ok(());
    }
    let size = want.dtype().size_in_bytes();
    let (got_bytes, want_bytes) = (got.to_le_bytes(), want.to_le_bytes());
    let mut pairs = got_bytes.chunks_exact(size).zip(want_bytes.chunks_exact(size));
    let at = pairs.position(|(got, want)| got != want).unwrap_or_default();
    let [row, column] = [at / want.embedding_dim(), at % want.embedding_dim()];
    Err(Failure::new(format!(
        "{what}: row {row}, column {column} is {}, expected the bits of {}",
        got.to_f64_vec()[at],
        want.to_f64_vec()[at],
    )))
}

/// Within the [`tolerance`] of `dtype`.
pub(crate) fn close(what: &str, got: &TokenRows, want: &Exact, dtype: DType) -> Outcome {
    close_within(what, got, want, tolerance(dtype))
}

/// Within a tolerance relative to the largest value, or to 1.
pub(crate) fn close_within(what: &str, got: &TokenRows, want: &Exact, tolerance: f64) -> Outcome {
    ensure!(
        got.shape() == want.shape,
        "{what}: shape {:?}, expected {:?}",
        got.shape(),
        want.shape
    );
    let finite = want.values.iter().filter(|x| x.is_finite());
    let largest = finite.fold(1f64, |most, x| most.max(x.abs()));
    let allowed = tolerance * largest;
    for (at, (got, want)) in got.to_f64_vec().iter().zip(&want.values).enumerate() {
        ensure!(
            got == want || got.is_nan() && want.is_nan() || (got - want).abs() <= allowed,
            "{what}: value {at} is {got}, expected {want} within {allowed:.1e}"
        );
    }
    Ok(())
}

/// The exact values of a result, in `f64`.
#[derive(Clone, Debug)]
pub(crate) struct Exact {
    pub(crate) shape: [usize; 2],
    pub(crate) values: Vec<f64>,
}

impl Exact {
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        Self {
            shape: [rows, columns],
            values: vec![0.0; rows * columns],
        }
    }

    pub(crate) fn of(rows: &TokenRows) -> Self {
        Self {
            shape: rows.shape(),
            values: rows.to_f64_vec(),
        }
    }

    pub(crate) fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.shape[1]..][..self.shape[1]]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.values[row * self.shape[1]..][..self.shape[1]]
    }

    /// The rows `ids`, in that order.
    pub(crate) fn select(&self, ids: &[u32]) -> Self {
        let values = ids.iter().flat_map(|id| self.row(*id as usize)).copied();
        Self {
            values: values.collect(),
            shape: [ids.len(), self.shape[1]],
        }
    }
}

/// The call must be refused, with this kind of error.
pub(crate) fn refused<T, E: BackendError>(what: &str, result: Result<T, E>, kind: ErrorKind) -> Outcome {
    match result {
        Ok(_) => Err(Failure::new(format!(
            "{what} is accepted, expected an error of kind {kind:?}"
        ))),
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => Err(Failure::new(format!(
            "{what} is refused as {:?} ({error}), expected {kind:?}",
            error.kind()
        ))),
    }
}

/// The call must be refused, with this kind of error and these words in its message.
pub(crate) fn refused_naming<T, E: BackendError>(
    what: &str,
    result: Result<T, E>,
    kind: ErrorKind,
    words: &[&str],
) -> Outcome {
    let text = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    refused(what, result, kind)?;
    for word in words {
        ensure!(
            text.contains(word),
            "{what} is refused without naming {word}: {text}"
        );
    }
    Ok(())
}

/// Equality of anything that can be shown.
pub(crate) fn equal<T: PartialEq + Debug>(what: &str, got: &T, want: &T) -> Outcome {
    ensure!(got == want, "{what} is {got:?}, expected {want:?}");
    Ok(())
}

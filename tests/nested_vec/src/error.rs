//! The backend's error.

use trainable_tokens_core::{BackendError, ErrorKind};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What this backend can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Core refused.
    #[error(transparent)]
    Core(#[from] trainable_tokens_core::Error),
    /// A row is longer or shorter than the others.
    #[error("row {row} has {got} elements, expected {expected}")]
    Ragged {
        /// The row.
        row: usize,
        /// How many elements it must have.
        expected: usize,
        /// How many it has.
        got: usize,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Ragged { .. } => ErrorKind::Shape,
        }
    }
}

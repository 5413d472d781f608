//! The backend's error.

use trainable_tokens_core::{BackendError, ErrorKind};

/// What the ndarray backend can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Core refused.
    #[error(transparent)]
    Core(#[from] trainable_tokens_core::Error),
    /// The rows of the table are not contiguous in memory.
    #[error(
        "the table of shape {shape:?} and strides {strides:?} is not row-major; make it `as_standard_layout`"
    )]
    Layout {
        /// The table's shape.
        shape: Vec<usize>,
        /// The table's strides, in elements.
        strides: Vec<isize>,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Layout { .. } => ErrorKind::Shape,
        }
    }
}

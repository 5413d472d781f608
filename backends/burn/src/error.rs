//! The backend's error.

use burn::tensor::{DType, DataError, ExecutionError};
use trainable_tokens_core::{BackendError, Error as CoreError, ErrorKind};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What this backend can refuse, or burn itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A refusal shared by all backends.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// Burn could not run an operation or read its result.
    #[error(transparent)]
    Execution(#[from] ExecutionError),
    /// Burn could not convert a tensor's data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A tensor's element type is not supported for its use.
    #[error("{what} has element type {got:?}, expected {expected}")]
    ElementType {
        /// What has the type.
        what: &'static str,
        /// The types it may have.
        expected: &'static str,
        /// The type it has.
        got: DType,
    },
    /// A device cannot compute in an element type.
    #[error("{device} does not support the element type {dtype} of {what}")]
    Unsupported {
        /// What has the type.
        what: &'static str,
        /// The type.
        dtype: trainable_tokens_core::DType,
        /// The device, as burn prints it.
        device: String,
    },
    /// Two tensors that work together lie on different devices.
    #[error("{what} lies on {got}, expected {expected}")]
    Device {
        /// What lies elsewhere.
        what: &'static str,
        /// Where it must lie.
        expected: String,
        /// Where it lies.
        got: String,
    },
    /// What is asked of trained rows can only be asked of a parameter.
    #[error("the rows are a combination of several adapters' rows; use those of each adapter")]
    Combination,
    /// A model has no parameter of the given path, or it is not a table.
    #[error("the model has no two-dimensional parameter {path}")]
    NoSuchTable {
        /// The path that was asked for.
        path: String,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Execution(_) | Self::Data(_) => ErrorKind::Framework,
            Self::ElementType { .. } => ErrorKind::DType,
            Self::Unsupported { .. } | Self::Device { .. } | Self::Combination => ErrorKind::Unsupported,
            Self::NoSuchTable { .. } => ErrorKind::Shape,
        }
    }
}

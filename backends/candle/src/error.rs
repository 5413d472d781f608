//! The backend's error.

use candle_core::{DType, DeviceLocation};
use trainable_tokens_core::{BackendError, Error as CoreError, ErrorKind};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What this backend can refuse, or candle itself.
///
/// It converts into [`candle_core::Error`], so that `?` works in functions that return candle's result; its text
/// is kept there, its kind is not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A refusal shared by all backends.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// Candle failed.
    #[error(transparent)]
    Candle(Box<candle_core::Error>),
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
    /// A tensor has the wrong number of dimensions.
    #[error("{what} has shape {got:?}, expected {expected}")]
    Rank {
        /// What has the shape.
        what: &'static str,
        /// The shapes it may have.
        expected: &'static str,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A tensor must be contiguous, because a copy would not share its storage.
    #[error("{what} is not contiguous in memory")]
    NotContiguous {
        /// What is not contiguous.
        what: &'static str,
    },
    /// Two tensors that work together lie on different devices.
    #[error("{what} lies on {got:?}, expected {expected:?}")]
    Device {
        /// What lies elsewhere.
        what: &'static str,
        /// Where it must lie.
        expected: DeviceLocation,
        /// Where it lies.
        got: DeviceLocation,
    },
    /// Rows that were put together from several adapters cannot be written, and no optimizer can hold them.
    #[error("rows put together from several adapters are no variable; write and step the adapters' own")]
    Combination,
    /// A token id is not among the ids that a compact table was built for.
    #[error("token id {id} is not among the ids that the compact table was built for")]
    NotInDataSet {
        /// The offending id.
        id: u32,
    },
    /// A compact table holds the rows of adapters, and no means of them.
    #[error(
        "a compact table has no place for means of rows; let the last adapter win, or activate disjoint ones"
    )]
    NoPlaceForMean,
    /// The table that rows were read from failed.
    #[error("cannot read the embedding table: {source}")]
    Source {
        /// The sort of failure.
        kind: ErrorKind,
        /// The table's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Candle(_) => ErrorKind::Framework,
            Self::ElementType { .. } => ErrorKind::DType,
            Self::Rank { .. } => ErrorKind::Shape,
            Self::NotContiguous { .. } | Self::Device { .. } | Self::Combination | Self::NoPlaceForMean => {
                ErrorKind::Unsupported
            }
            Self::NotInDataSet { .. } => ErrorKind::TokenOutOfRange,
            Self::Source { kind, .. } => *kind,
        }
    }
}

impl Error {
    /// Wraps the error of a table of any backend.
    pub(crate) fn source<E: BackendError>(error: E) -> Self {
        Self::Source {
            kind: error.kind(),
            source: Box::new(error),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(Box::new(error))
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => *error,
            other => Self::wrap(other),
        }
    }
}

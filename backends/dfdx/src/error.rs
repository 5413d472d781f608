//! The backend's error.

use std::fmt::Display;

use trainable_tokens_core::{BackendError, Error as CoreError, ErrorKind};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What this backend can refuse, or dfdx itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A refusal shared by all backends.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A device of dfdx failed. Its errors need not be standard errors, so their text is kept.
    #[error("dfdx failed: {message}")]
    Dfdx {
        /// What the device said.
        message: String,
    },
    /// The operation is not possible where the tensors lie.
    #[error("{what} is not possible: {why}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What stands in the way.
        why: &'static str,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Dfdx { .. } => ErrorKind::Framework,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }
}

impl Error {
    /// Keeps what a device of dfdx said.
    pub(crate) fn dfdx<E: Display>(error: E) -> Self {
        let message = error.to_string();
        Self::Dfdx { message }
    }
}

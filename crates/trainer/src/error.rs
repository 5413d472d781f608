//! The trainer's error.

use std::path::PathBuf;

use trainable_tokens_core::{BackendError, ErrorKind};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What training can refuse. Each names the file, line, tensor or token at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Core refused.
    #[error(transparent)]
    Core(#[from] trainable_tokens_core::Error),
    /// The candle backend refused.
    #[error(transparent)]
    Backend(#[from] trainable_tokens_candle::Error),
    /// Candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A checkpoint or an adapter is not what it should be.
    #[error(transparent)]
    Format(#[from] trainable_tokens_format::Error),
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `config.json` is not JSON, or a field is missing or of the wrong type.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model is of a family or has a setting that the decoder does not implement.
    #[error("{}: {what} is not supported: {hint}", path.display())]
    UnsupportedModel {
        /// The file.
        path: PathBuf,
        /// The field and its value.
        what: String,
        /// What is supported.
        hint: &'static str,
    },
    /// A line of a data set is not what it should be.
    #[error("{}, line {line}: {reason}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A data set as a whole cannot be used.
    #[error("{}: {reason}", path.display())]
    Dataset {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer cannot be loaded or used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A string is not one token.
    #[error("token '{token}' {reason}")]
    NotOneToken {
        /// The string.
        token: String,
        /// What it encodes to instead.
        reason: String,
    },
    /// A text has no token that says anything.
    #[error("'{text}' {reason}")]
    NoPieces {
        /// The text.
        text: String,
        /// What it encodes to instead, and what to do.
        reason: &'static str,
    },
    /// A setting is out of its range.
    #[error("{0}")]
    Setting(String),
    /// The gradient that the framework computes is not the slope of the loss.
    #[error(
        "the gradient does not match the loss: relative error {relative_error:.3} over {directions} directions, more \
         than {tolerance}; an operation of the model cuts or alters it, so nothing was trained"
    )]
    GradientMismatch {
        /// Root mean square of the difference, relative to the finite differences.
        relative_error: f64,
        /// How many directions were compared.
        directions: usize,
        /// The largest error accepted.
        tolerance: f64,
    },
    /// The loss stopped being a number.
    #[error("the loss is {loss} at step {step}: lower the learning rate, or check the data of {lines}")]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// The loss.
        loss: f64,
        /// The lines of the batch.
        lines: String,
    },
    /// The gradient stopped being a number, though the loss is one.
    #[error(
        "the gradient is not finite at step {step}, where the loss is {loss:.3e}: lower the learning rate, or check the \
         data of {lines}"
    )]
    DivergedGradient {
        /// The step, from 1.
        step: u64,
        /// The loss.
        loss: f64,
        /// The lines of the batch.
        lines: String,
    },
    /// A saved state does not belong to this run.
    #[error("{}: {reason}", path.display())]
    Resume {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Backend(error) => error.kind(),
            Self::Format(error) => error.kind(),
            Self::Candle(_) => ErrorKind::Framework,
            Self::Read { .. }
            | Self::Config { .. }
            | Self::Data { .. }
            | Self::Dataset { .. }
            | Self::Tokenizer { .. }
            | Self::Resume { .. } => ErrorKind::File,
            Self::UnsupportedModel { .. } => ErrorKind::Unsupported,
            Self::NotOneToken { .. } | Self::NoPieces { .. } => ErrorKind::TokenOutOfRange,
            Self::Setting(_) => ErrorKind::Hyperparameter,
            Self::GradientMismatch { .. } | Self::Diverged { .. } | Self::DivergedGradient { .. } => {
                ErrorKind::NoGradient
            }
        }
    }
}

//! The typed error and its kind.

use std::fmt;

use crate::{DType, InitError, TokenId};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of thing went wrong, the same in every backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A token id is outside the vocabulary.
    TokenOutOfRange,
    /// A token id was given twice.
    DuplicateToken,
    /// A shape does not fit.
    Shape,
    /// An element type does not fit.
    DType,
    /// A plan belongs to another set of trainable tokens.
    TokenSet,
    /// The layer is in the wrong state for the call (merged, not merged, disabled).
    State,
    /// No adapter has the name, or the name is taken, or is no name.
    Adapter,
    /// Two adapters train the same token.
    Overlap,
    /// A value is not finite.
    NonFinite,
    /// The loss does not reach the trained rows.
    NoGradient,
    /// A mean loss is asked for, but no label counts.
    AllIgnored,
    /// A hyper-parameter is out of its range.
    Hyperparameter,
    /// Rows cannot be initialised as asked.
    Init,
    /// The request is valid, but this backend cannot serve it.
    Unsupported,
    /// The framework itself failed.
    Framework,
    /// Reading or writing a file failed, or its content is not what it should be.
    File,
}

/// The error of every backend: a standard error with a kind, made from core's own.
pub trait BackendError: std::error::Error + From<Error> + Send + Sync + 'static {
    /// The sort of failure.
    fn kind(&self) -> ErrorKind;
}

/// What core itself can refuse.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A token id is not below the vocabulary size (or is negative).
    TokenOutOfRange {
        /// The offending id.
        id: i64,
        /// Rows of the table.
        vocab_size: usize,
    },
    /// A token id occurs twice among the trainable tokens.
    DuplicateToken {
        /// The repeated id.
        id: TokenId,
        /// The slot where it stands first.
        first: usize,
        /// The slot where it stands again.
        second: usize,
    },
    /// The table has more than `2^32 - 1` rows.
    VocabularyTooLarge {
        /// Rows of the table.
        vocab_size: usize,
    },
    /// The shape of `what` is not the expected one.
    Shape {
        /// What has the shape.
        what: &'static str,
        /// The shape it must have.
        expected: Vec<usize>,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// The element type of `what` is not the expected one.
    DType {
        /// What has the type.
        what: &'static str,
        /// The type it must have.
        expected: DType,
        /// The type it has.
        got: DType,
    },
    /// A plan was made for another token set than the layer's.
    ForeignPlan,
    /// The adapter's rows are already written into the table.
    AlreadyMerged {
        /// The adapter.
        adapter: String,
    },
    /// There is no merge to undo.
    NotMerged,
    /// The layer is disabled.
    Disabled,
    /// No adapter has the name.
    UnknownAdapter {
        /// The name.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// An adapter cannot have the name.
    AdapterName {
        /// The name.
        name: String,
        /// What it must be.
        must: &'static str,
    },
    /// An active adapter cannot be deleted.
    AdapterActive {
        /// The adapter.
        name: String,
    },
    /// The call is about the one active adapter, but none or several are active.
    NotOneActive {
        /// The active adapters.
        active: Vec<String>,
    },
    /// Two adapters train the same token, and nothing says which of them counts.
    Overlap {
        /// The token.
        token: TokenId,
        /// The adapter that came first.
        first: String,
        /// The other adapter.
        second: String,
    },
    /// A row to merge is not finite in the table's element type.
    NonFinite {
        /// The adapters that are merged.
        adapters: Vec<String>,
        /// The row's token.
        token: TokenId,
        /// The column of the first such value.
        column: usize,
    },
    /// The gradients hold nothing for the trained rows: the loss does not depend on them, or the graph is cut.
    NoGradient,
    /// A label is neither a token's id nor ignored.
    LabelOutOfRange {
        /// Its place among the labels.
        position: usize,
        /// The label.
        id: i64,
        /// Rows of the table.
        vocab_size: usize,
    },
    /// No label counts, so that there is no mean loss.
    AllIgnored {
        /// The number of labels.
        num_rows: usize,
    },
    /// The backend does not serve the call.
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// A hyper-parameter is out of its range.
    Hyperparameter {
        /// Its name, as torch spells it.
        name: &'static str,
        /// The value given.
        value: f64,
        /// What it must be.
        must: &'static str,
    },
    /// Rows cannot be initialised as asked.
    Init(InitError),
    /// An optimizer state lacks a tensor, or holds one that does not fit.
    OptimizerState {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// [`Shape`](Self::Shape), from shapes that are borrowed.
    pub fn shape(what: &'static str, expected: &[usize], got: &[usize]) -> Self {
        Self::Shape {
            what,
            expected: expected.to_vec(),
            got: got.to_vec(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenOutOfRange { id, vocab_size } => {
                write!(f, "token id {id} is outside the vocabulary of {vocab_size} rows")
            }
            Self::DuplicateToken { id, first, second } => {
                write!(f, "token id {id} is given twice, in slots {first} and {second}")
            }
            Self::VocabularyTooLarge { vocab_size } => {
                write!(
                    f,
                    "a table of {vocab_size} rows has more than the 4294967295 that are supported"
                )
            }
            Self::Shape { what, expected, got } => {
                write!(f, "{what} has shape {got:?}, expected {expected:?}")
            }
            Self::DType { what, expected, got } => {
                write!(f, "{what} has element type {got}, expected {expected}")
            }
            Self::ForeignPlan => f.write_str("the plan was made for another set of trainable tokens"),
            Self::AlreadyMerged { adapter } => {
                write!(
                    f,
                    "adapter {adapter:?} is merged into the table; unmerge it first"
                )
            }
            Self::NotMerged => f.write_str("nothing is merged, so there is nothing to unmerge"),
            Self::Disabled => f.write_str("the adapters are disabled; enable them first"),
            Self::UnknownAdapter { name, known } => {
                write!(f, "there is no adapter {name:?}, only {known:?}")
            }
            Self::AdapterName { name, must } => write!(f, "adapter name {name:?} must be {must}"),
            Self::AdapterActive { name } => {
                write!(
                    f,
                    "adapter {name:?} is active; activate others before it is deleted"
                )
            }
            Self::NotOneActive { active } if active.is_empty() => {
                f.write_str("no adapter is active; activate one or name it")
            }
            Self::NotOneActive { active } => {
                write!(
                    f,
                    "several adapters are active, {active:?}; name the one that is meant"
                )
            }
            Self::Overlap { token, first, second } => write!(
                f,
                "token id {token} is trained by both adapter {first:?} and adapter {second:?}; \
                 choose which counts, or adapters of different tokens"
            ),
            Self::NonFinite {
                adapters,
                token,
                column,
            } => write!(
                f,
                "adapter {} is not finite for token id {token} at column {column} in the table's element type",
                adapters.join(" and ")
            ),
            Self::NoGradient => f.write_str(
                "no gradient reaches the trained rows: the loss does not depend on them or the graph is cut",
            ),
            Self::LabelOutOfRange {
                position,
                id,
                vocab_size,
            } => write!(
                f,
                "label {id} at position {position} is neither ignored nor in the vocabulary of {vocab_size} rows"
            ),
            Self::AllIgnored { num_rows } => {
                write!(f, "none of {num_rows} labels counts, so there is no mean loss")
            }
            Self::Unsupported { what } => write!(f, "this backend has no {what}"),
            Self::Hyperparameter { name, value, must } => {
                write!(f, "{name} is {value}, but it must be {must}")
            }
            Self::Init(error) => error.fmt(f),
            Self::OptimizerState { name, reason } => write!(f, "optimizer state {name}: {reason}"),
        }
    }
}

impl std::error::Error for Error {}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::TokenOutOfRange { .. } | Self::VocabularyTooLarge { .. } | Self::LabelOutOfRange { .. } => {
                ErrorKind::TokenOutOfRange
            }
            Self::DuplicateToken { .. } => ErrorKind::DuplicateToken,
            Self::Shape { .. } | Self::OptimizerState { .. } => ErrorKind::Shape,
            Self::DType { .. } => ErrorKind::DType,
            Self::ForeignPlan => ErrorKind::TokenSet,
            Self::AlreadyMerged { .. }
            | Self::NotMerged
            | Self::Disabled
            | Self::AdapterActive { .. }
            | Self::NotOneActive { .. } => ErrorKind::State,
            Self::UnknownAdapter { .. } | Self::AdapterName { .. } => ErrorKind::Adapter,
            Self::Overlap { .. } => ErrorKind::Overlap,
            Self::NonFinite { .. } => ErrorKind::NonFinite,
            Self::NoGradient => ErrorKind::NoGradient,
            Self::AllIgnored { .. } => ErrorKind::AllIgnored,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Hyperparameter { .. } => ErrorKind::Hyperparameter,
            Self::Init(_) => ErrorKind::Init,
        }
    }
}

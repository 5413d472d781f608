//! The typed error.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use trainable_tokens_core::{BackendError, DType, ErrorKind};

use crate::diff::TensorDiff;

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a file could not be read or written. Every message is one line that names the culprit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What core refuses: ids, shapes, element types.
    #[error(transparent)]
    Core(#[from] trainable_tokens_core::Error),
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", shown(path))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file or directory that must exist does not.
    #[error("{} does not exist; {hint}", shown(path))]
    NotFound {
        /// The missing file or directory.
        path: PathBuf,
        /// What belongs there, or what to do.
        hint: &'static str,
    },
    /// A part of a file is larger than any honest one.
    #[error("{}: {what} of {bytes} bytes is above the limit of {limit}", shown(path))]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The part.
        what: &'static str,
        /// Its size, as found or as claimed.
        bytes: u64,
        /// The largest size that is read.
        limit: u64,
    },
    /// The frame of a safetensors file is broken.
    #[error("{} is not a valid safetensors file: {reason}", shown(path))]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name where one is to blame.
        reason: String,
    },
    /// A tensor that must be there is not.
    #[error("{}: there is no tensor {tensor:?}{hint}", shown(path))]
    TensorMissing {
        /// The file or checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// More about it, starting with a separator; may be empty.
        hint: String,
    },
    /// A tensor has the wrong shape.
    #[error("{}: tensor {tensor:?} has shape {got:?}, expected {expected}", shown(path))]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape it must have, and why.
        expected: String,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A tensor has an element type that cannot be a table or rows.
    #[error(
        "{}: tensor {tensor:?} has element type {got:?}, expected F64, F32, F16 or BF16",
        shown(path)
    )]
    TensorDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type it has.
        got: Dtype,
    },
    /// The name of a tensor is almost that of trained rows.
    #[error(
        "{}: tensor {tensor:?} is not named as PEFT names rows; expected {expected:?}",
        shown(path)
    )]
    TensorKey {
        /// The file.
        path: PathBuf,
        /// The name found.
        tensor: String,
        /// The name it should have.
        expected: String,
    },
    /// Two copies of the rows of tied modules differ.
    #[error(
        "{}: tensors {first:?} and {second:?} are copies of tied rows but differ in row {row}",
        shown(path)
    )]
    TiedCopies {
        /// The file.
        path: PathBuf,
        /// One copy.
        first: String,
        /// The other copy.
        second: String,
        /// The first row that differs.
        row: usize,
    },
    /// Two modules of the adapter are one table in the model, but train different tokens.
    #[error(
        "modules {first:?} and {second:?} share one table in {}, but train different tokens; give both the same token \
         ids",
        shown(path)
    )]
    TiedTokens {
        /// The model.
        path: PathBuf,
        /// One module.
        first: String,
        /// The other module.
        second: String,
    },
    /// A target names no module of the model.
    #[error("no module of {} is {target:?}; it has the tables {tables:?}", shown(path))]
    NoTarget {
        /// The model.
        path: PathBuf,
        /// What was asked for.
        target: String,
        /// A few of the model's tables.
        tables: Vec<String>,
    },
    /// A module is targeted that is no table of token vectors.
    #[error(
        "module {module:?} of {} is no embedding table: {reason}; target the embedding or the head",
        shown(path)
    )]
    NotATable {
        /// The model.
        path: PathBuf,
        /// The module.
        module: String,
        /// What tells it.
        reason: String,
    },
    /// An adapter cannot have this name.
    #[error("{name:?} cannot be the name of an adapter: {reason}")]
    AdapterName {
        /// The name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A file is not the JSON it should be.
    #[error("{} is not valid JSON: {reason}", shown(path))]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        reason: String,
    },
    /// A field of a JSON file, or a key of a file's metadata, has a wrong value.
    #[error("{}: {field}: {reason}", shown(path))]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with the index into it where one is to blame.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// The file is sound but of a kind that this library does not read.
    #[error("{}: {what}", shown(path))]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported, and what to do.
        what: String,
    },
    /// The metadata of an adapter contradict its config or its rows.
    #[error("{}: metadata {key} says {metadata}, but {other}", shown(path))]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: String,
        /// Its value.
        metadata: String,
        /// Where the contradiction stands, and the value there.
        other: String,
    },
    /// An adapter does not fit the base that it is used with.
    #[error("adapter does not fit {}: {reason}", shown(path))]
    Base {
        /// The base checkpoint.
        path: PathBuf,
        /// The sort of misfit.
        kind: ErrorKind,
        /// What does not fit, with both values.
        reason: String,
    },
    /// Two checkpoints differ in more than rows of token tables.
    #[error(
        "{} differs from the base in more than rows of tokens: {}; an adapter of rows cannot express that",
        shown(path),
        brief(tensors)
    )]
    NotOnlyRows {
        /// The tuned checkpoint.
        path: PathBuf,
        /// What else differs.
        tensors: Vec<TensorDiff>,
    },
    /// Two checkpoints have the same tensors.
    #[error(
        "{} has the same tensors as the base, bit for bit: there are no rows to extract",
        shown(path)
    )]
    NothingToExtract {
        /// The tuned checkpoint.
        path: PathBuf,
    },
    /// So many rows differ that an adapter would be about as large as the table.
    #[error(
        "{}: {rows} of the {vocab_size} rows of {tensor} differ from the base, more than the limit of {limit}; keep the          whole model, or raise the limit",
        shown(path)
    )]
    TooManyRows {
        /// The tuned checkpoint.
        path: PathBuf,
        /// The table.
        tensor: String,
        /// How many rows differ, in this table or another that changed with it.
        rows: usize,
        /// How many it has.
        vocab_size: usize,
        /// How many may differ.
        limit: usize,
    },
    /// A merge would write a value that is not finite, where the base has one that is.
    #[error(
        "adapter {adapters} would make {tensor} not finite at {place} {row}, column {column}, in its element type {dtype}"
    )]
    NonFinite {
        /// The adapters that change the tensor.
        adapters: String,
        /// The tensor.
        tensor: String,
        /// What the number of the row is: that of a row, or a token id.
        place: &'static str,
        /// The row.
        row: usize,
        /// The column of the first such value.
        column: usize,
        /// The tensor's element type.
        dtype: DType,
    },
    /// The target exists and must not be replaced.
    #[error("{} already exists", shown(path))]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target cannot be written, or must not be, even when replacing is allowed.
    #[error("will not write to {}: {reason}", shown(path))]
    Target {
        /// The target.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl BackendError for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Core(error) => error.kind(),
            Self::Base { kind, .. } => *kind,
            Self::TiedTokens { .. } => ErrorKind::TokenSet,
            Self::TensorShape { .. } | Self::NotATable { .. } => ErrorKind::Shape,
            Self::TensorDType { .. } => ErrorKind::DType,
            Self::NonFinite { .. } => ErrorKind::NonFinite,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::File,
        }
    }
}

impl Error {
    /// Makes an [`Error::Io`] of a failed call.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Makes an [`Error::Field`].
    pub(crate) fn field(path: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field {
            path: path.to_owned(),
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// The first of a few tensors, and how many more there are.
fn brief(tensors: &[TensorDiff]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<_> = tensors.iter().take(SHOWN).map(one_line).collect();
    let more = match tensors.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    shown.join(", ") + &more
}

/// Escapes control characters, so that a message stays on one line whatever a file holds.
pub(crate) fn one_line(text: impl fmt::Display) -> String {
    text.to_string().chars().fold(String::new(), |mut out, c| {
        if c.is_control() {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
        out
    })
}

/// A path, on one line.
pub(crate) fn shown(path: &Path) -> String {
    one_line(path.display())
}

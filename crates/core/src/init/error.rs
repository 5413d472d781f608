//! Why rows cannot be initialised as asked.

use std::fmt;

use crate::{DType, Error, TokenId};

/// What is wrong with a table, or with the tokens named, for an initialisation that is well-formed otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitError {
    /// A row of the table that would be used, or what was computed from it, is not a finite number.
    NotFinite {
        /// The token of the row.
        id: TokenId,
        /// The column of the first such element.
        column: usize,
    },
    /// A row is finite in `f64`, but too large for the element type asked for.
    Overflow {
        /// The token of the row.
        id: TokenId,
        /// The column of the first such element.
        column: usize,
        /// The element type.
        dtype: DType,
    },
    /// A row of zeros cannot be scaled to a norm.
    ZeroNorm {
        /// The token of the row.
        id: TokenId,
    },
    /// A row is to stay as it is, of a token that has none yet.
    NoRow {
        /// The token.
        id: TokenId,
    },
    /// The mean of no row at all.
    NoTokens,
    /// The mean of the rows that do not train, where all train.
    NoOthers,
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite { id, column } => {
                write!(f, "the row of token id {id} is not finite at column {column}")
            }
            Self::Overflow { id, column, dtype } => {
                write!(
                    f,
                    "the row of token id {id} is too large for {dtype} at column {column}"
                )
            }
            Self::ZeroNorm { id } => {
                write!(
                    f,
                    "the row of token id {id} is zero, so no factor gives it a norm; add noise before norm-match"
                )
            }
            Self::NoRow { id } => {
                write!(
                    f,
                    "token id {id} has no row in the table yet that could be kept; choose another init"
                )
            }
            Self::NoTokens => f.write_str("the mean of no token's row is asked for; name at least one token"),
            Self::NoOthers => f.write_str(
                "the mean of the rows that do not train is asked for, but all train; take the mean of all",
            ),
        }
    }
}

impl std::error::Error for InitError {}

impl From<InitError> for Error {
    fn from(error: InitError) -> Self {
        Self::Init(error)
    }
}

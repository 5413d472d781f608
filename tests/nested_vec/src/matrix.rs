//! The framework: a matrix, and nothing else.

use trainable_tokens_core::{Element, TokenRows};

use crate::{Error, Result};

/// Rows of equal length.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix<T> {
    /// The rows.
    pub(crate) rows: Vec<Vec<T>>,
    /// Their length, which an empty matrix has too.
    pub(crate) columns: usize,
}

impl<T: Element> Matrix<T> {
    /// A matrix of these rows.
    ///
    /// # Errors
    ///
    /// [`Error::Ragged`] naming the first row that has not `columns` elements.
    pub fn new(rows: Vec<Vec<T>>, columns: usize) -> Result<Self> {
        match rows.iter().position(|row| row.len() != columns) {
            None => Ok(Self { rows, columns }),
            Some(row) => Err(Error::Ragged {
                row,
                expected: columns,
                got: rows[row].len(),
            }),
        }
    }

    /// How many rows there are.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// Copies core's rows, rounded if they are of another type.
    pub fn from_token_rows(rows: &TokenRows) -> Self {
        let columns = rows.embedding_dim();
        let copy = |row| {
            let mut copy = vec![T::default(); columns];
            if let Some(row) = rows.row(row) {
                row.decode_into(&mut copy);
            }
            copy
        };
        Self {
            rows: (0..rows.num_rows()).map(copy).collect(),
            columns,
        }
    }

    /// Copies the matrix to core's rows.
    ///
    /// # Errors
    ///
    /// None in fact: the sizes fit.
    pub fn to_token_rows(&self) -> Result<TokenRows> {
        Ok(TokenRows::new(self.rows.concat(), self.rows.len(), self.columns)?)
    }

    /// Checks that the shape is `[rows, columns]`.
    pub(crate) fn expect_shape(&self, what: &'static str, rows: usize, columns: usize) -> Result<()> {
        let (expected, got) = (vec![rows, columns], vec![self.rows.len(), self.columns]);
        if expected == got {
            return Ok(());
        }
        Err(trainable_tokens_core::Error::Shape { what, expected, got }.into())
    }
}

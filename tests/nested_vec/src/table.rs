//! The frozen table.

use trainable_tokens_core::{DType, Element, EmbeddingSource, TokenId, TokenRows, WriteRows};

use crate::{Error, Matrix};

/// An embedding table, one vector per row.
#[derive(Clone, Debug)]
pub struct VecTable<T>(pub(crate) Matrix<T>);

impl<T: Element> VecTable<T> {
    /// Takes a matrix `[V, D]` as a table.
    pub fn new(matrix: Matrix<T>) -> Self {
        Self(matrix)
    }
}

impl<T: Element> EmbeddingSource for VecTable<T> {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.0.rows.len()
    }

    fn embedding_dim(&self) -> usize {
        self.0.columns
    }

    fn dtype(&self) -> DType {
        T::DTYPE
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows, Error> {
        self.check_ids(ids)?;
        let rows = ids.iter().map(|id| self.0.rows[id.row()].clone()).collect();
        Matrix::new(rows, self.0.columns)?.to_token_rows()
    }
}

impl<T: Element> WriteRows for VecTable<T> {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<(), Error> {
        self.check_write(ids, rows)?;
        for (id, row) in ids.iter().zip(Matrix::from_token_rows(rows).rows) {
            self.0.rows[id.row()] = row;
        }
        Ok(())
    }
}

//! The trained rows.

use trainable_tokens_core::{DType, DeltaStore, TokenRows};

use crate::Error;

/// The trained rows. Without a framework they need no other form than core's.
#[derive(Clone, Debug)]
pub struct VecRows(TokenRows);

impl VecRows {
    /// Takes rows `[k, D]` to train.
    pub fn new(rows: TokenRows) -> Self {
        Self(rows)
    }

    /// The rows, `[k, D]` in slot order.
    pub fn rows(&self) -> &TokenRows {
        &self.0
    }
}

impl DeltaStore for VecRows {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.0.num_rows()
    }

    fn embedding_dim(&self) -> usize {
        self.0.embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.0.dtype()
    }

    fn read(&self) -> Result<TokenRows, Error> {
        Ok(self.0.clone())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<(), Error> {
        self.check_write(rows)?;
        self.0.clone_from(rows);
        Ok(())
    }
}

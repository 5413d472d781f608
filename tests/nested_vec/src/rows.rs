//! The trained rows.

use trainable_tokens_core::{DType, DeltaStore, HostRows, TokenRows};

use crate::Error;

/// The trained rows. Without a framework they need no other form than core's.
#[derive(Clone, Debug)]
pub struct VecRows(pub HostRows);

impl VecRows {
    /// Takes rows `[k, D]` to train.
    pub fn new(rows: TokenRows) -> Self {
        Self(HostRows::new(rows))
    }

    /// The rows, `[k, D]` in slot order.
    pub fn rows(&self) -> &TokenRows {
        self.0.rows()
    }
}

impl AsRef<Self> for VecRows {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl DeltaStore for VecRows {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.rows().num_rows()
    }

    fn embedding_dim(&self) -> usize {
        self.rows().embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.rows().dtype()
    }

    fn read(&self) -> Result<TokenRows, Error> {
        Ok(self.rows().clone())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<(), Error> {
        self.check_write(rows)?;
        self.0.rows_mut().clone_from(rows);
        Ok(())
    }
}

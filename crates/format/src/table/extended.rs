//! A frozen table with rows after its last.

use trainable_tokens_core::{DType, EmbeddingSource, HostTable, RowRef, TokenId, TokenRows};

use super::MappedTable;
use crate::error::{Error, Result};

/// A table of a checkpoint and, after its last row, the rows of new tokens: `V' x D` of which `V` lie in the file. The
/// new rows have the table's element type. A clone shares the map.
#[derive(Clone, Debug)]
pub struct ExtendedTable {
    base: MappedTable,
    added: TokenRows,
}

impl ExtendedTable {
    /// Puts rows after the last one of a table, rounded to its type.
    ///
    /// # Errors
    ///
    /// Core's error if the rows have another length, or if ids of 32 bits cannot name them all.
    pub fn new(base: MappedTable, added: &TokenRows) -> Result<Self> {
        added.expect_shape("new rows", added.num_rows(), base.embedding_dim())?;
        let vocab_size = base.vocab_size().saturating_add(added.num_rows());
        if u32::try_from(vocab_size).is_err() {
            return Err(trainable_tokens_core::Error::VocabularyTooLarge { vocab_size }.into());
        }
        let added = added.to_dtype(base.dtype());
        Ok(Self { base, added })
    }

    /// The table in the file.
    pub fn base(&self) -> &MappedTable {
        &self.base
    }

    /// The rows after it, `[V' - V, D]` in its element type; none if the table is large enough.
    pub fn added(&self) -> &TokenRows {
        &self.added
    }
}

/// A table as it is.
impl From<MappedTable> for ExtendedTable {
    fn from(base: MappedTable) -> Self {
        let added = TokenRows::zeros(base.dtype(), 0, base.embedding_dim());
        Self { base, added }
    }
}

impl EmbeddingSource for ExtendedTable {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.base.vocab_size() + self.added.num_rows()
    }

    fn embedding_dim(&self) -> usize {
        self.base.embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        Ok(self.collect_rows(ids)?)
    }
}

impl HostTable for ExtendedTable {
    fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
        match id.row().checked_sub(self.base.vocab_size()) {
            None => self.base.row(id),
            Some(row) => self.added.row(row),
        }
    }
}

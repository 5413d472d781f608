//! The undo journal of merges.

use crate::{Error, TokenId, TokenRows, WriteRows};

/// The exact old rows of every merge, undone in reverse order only.
///
/// The rows are read from the table when it is overwritten, never kept from construction, so that undoing
/// restores the table's bits whatever happened to it before the merge.
#[derive(Clone, Debug, Default)]
pub struct UndoJournal {
    entries: Vec<(Vec<TokenId>, TokenRows)>,
}

impl UndoJournal {
    /// Overwrites rows of the table, rounded to its element type, and records the old ones.
    ///
    /// # Errors
    ///
    /// Those of the table; nothing is recorded then.
    pub fn apply<S: WriteRows>(
        &mut self,
        table: &mut S,
        ids: &[TokenId],
        rows: &TokenRows,
    ) -> Result<(), S::Error> {
        let old = table.read_rows(ids)?;
        table.write_rows(ids, &rows.to_dtype(table.dtype()))?;
        self.entries.push((ids.to_vec(), old));
        Ok(())
    }

    /// Restores the rows of the latest [`apply`](Self::apply) that was not undone.
    ///
    /// # Errors
    ///
    /// [`Error::NotMerged`] if there is none, and those of the table; the entry is kept then.
    pub fn undo<S: WriteRows>(&mut self, table: &mut S) -> Result<(), S::Error> {
        let (ids, old) = self.entries.last().ok_or(Error::NotMerged)?;
        table.write_rows(ids, old)?;
        self.entries.pop();
        Ok(())
    }

    /// A journal of merges that are to be undone, the latest last.
    pub(crate) fn from_entries(entries: Vec<(Vec<TokenId>, TokenRows)>) -> Self {
        Self { entries }
    }

    pub(crate) fn into_entries(self) -> Vec<(Vec<TokenId>, TokenRows)> {
        self.entries
    }

    /// Whether nothing is left to undo.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

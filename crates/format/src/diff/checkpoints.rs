//! Two checkpoints, compared through their maps.

use std::collections::BTreeSet;

use trainable_tokens_core::{EmbeddingSource as _, HostTable as _, TokenId};

use super::{RowDiff, TensorDiff, TensorDifference};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::model::ModelTables;
use crate::table::MappedTable;

/// Bytes of a table that are compared at a time, before single rows are.
const BLOCK_BYTES: usize = 1 << 20;

/// What differs between two checkpoints, bit for bit: two NaNs of the same bits are equal, 0 and -0 are not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointDiff {
    /// The tables of token vectors of which rows differ or are only in one, by name.
    pub tables: Vec<TableDiff>,
    /// All other tensors that differ, by name; among them tables whose element types or row lengths differ.
    pub tensors: Vec<TensorDiff>,
}

/// The rows in which two tables differ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableDiff {
    /// The name by which the first stores the tensor.
    pub tensor: String,
    /// The rows of each.
    pub vocab_sizes: [usize; 2],
    /// The rows that both have and whose bits differ, ascending.
    pub changed: Vec<TokenId>,
}

impl CheckpointDiff {
    /// Compares all tensors of two checkpoints, of the first's tables of token vectors (its input embedding, head, and
    /// what is tied to them; where the config names no class of transformers, what is named like one of these) row by
    /// row. A tensor that one stores with the base model's prefix and the other without is the same one.
    /// Reads each file once, through its map, and none that both share as a hard link; memory is for the ids of changed rows alone.
    ///
    /// # Errors
    ///
    /// Those of [`ModelTables::of`].
    pub fn between(first: &Checkpoint, second: &Checkpoint) -> Result<Self> {
        let model = ModelTables::of(first)?;
        let tables = model.token_tables().into_iter();
        let tables: BTreeSet<&str> = tables.filter_map(|path| first.stored_weight(path)).collect();
        let mut diff = Self::default();
        // In the order of the files' bytes.
        for name in first.names_by_place() {
            let Some(other) = second.counterpart(name, first) else {
                diff.add(name, TensorDifference::OnlyInFirst);
                continue;
            };
            if other == name && first.file_of(name)?.is_same_file(second.file_of(name)?) {
                continue;
            }
            let (a, b) = (first.tensor(name)?, second.tensor(other)?);
            if tables.contains(name)
                && a.dtype == b.dtype
                && let (Ok(a), Ok(b)) = (first.table(name), second.table(other))
                && a.embedding_dim() == b.embedding_dim()
            {
                diff.tables.extend(TableDiff::between(&a, &b));
            } else if let Some(difference) = TensorDifference::of(&a, &b) {
                diff.add(name, difference);
            }
        }
        for name in second
            .names()
            .filter(|name| first.counterpart(name, second).is_none())
        {
            diff.add(name, TensorDifference::OnlyInSecond);
        }
        diff.tables.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        diff.tensors.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        Ok(diff)
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.tensors.is_empty()
    }

    fn add(&mut self, tensor: &str, difference: TensorDifference) {
        let tensor = tensor.to_owned();
        self.tensors.push(TensorDiff { tensor, difference });
    }
}

impl TableDiff {
    /// Compares the rows of two tables of one element type and row length; `None` if they are the same.
    fn between(first: &MappedTable, second: &MappedTable) -> Option<Self> {
        let (a, b) = (first.bytes(), second.bytes());
        let row_bytes = (first.embedding_dim() * first.dtype().size_in_bytes()).max(1);
        let rows = (BLOCK_BYTES / row_bytes).max(1);
        let block_bytes = rows * row_bytes;
        let mut changed = Vec::new();
        let both = a.len().min(b.len());
        let blocks = a[..both].chunks(block_bytes).zip(b[..both].chunks(block_bytes));
        for (block, (a, b)) in blocks.enumerate().filter(|(_, (a, b))| a != b) {
            let pairs = a.chunks(row_bytes).zip(b.chunks(row_bytes));
            let differ = pairs.enumerate().filter(|(_, (a, b))| a != b);
            // Ids of 32 bits name every row of a mapped table.
            changed
                .extend(differ.filter_map(|(row, _)| Some(TokenId(u32::try_from(block * rows + row).ok()?))));
        }
        let vocab_sizes = [first.vocab_size(), second.vocab_size()];
        let is_same = changed.is_empty() && vocab_sizes[0] == vocab_sizes[1];
        (!is_same).then(|| Self {
            tensor: first.name().to_owned(),
            vocab_sizes,
            changed,
        })
    }

    /// The rows of the second table that the first has not, ascending.
    pub fn added(&self) -> impl Iterator<Item = TokenId> + use<> {
        ids(self.vocab_sizes[0], self.vocab_sizes[1])
    }

    /// The rows of the first table that the second has not, ascending.
    pub fn removed(&self) -> impl Iterator<Item = TokenId> + use<> {
        ids(self.vocab_sizes[1], self.vocab_sizes[0])
    }

    /// How far the changed rows are apart, one after another; `first` and `second` are the checkpoints compared.
    ///
    /// # Errors
    ///
    /// Those of [`Checkpoint::table`].
    pub fn rows(&self, first: &Checkpoint, second: &Checkpoint) -> Result<impl Iterator<Item = RowDiff>> {
        let name = second.counterpart(&self.tensor, first).unwrap_or(&self.tensor);
        let (first, second) = (first.table(&self.tensor)?, second.table(name)?);
        Ok(self
            .changed
            .iter()
            .filter_map(move |id| Some(RowDiff::of(*id, first.row(*id)?, second.row(*id)?))))
    }
}

fn ids(start: usize, end: usize) -> impl Iterator<Item = TokenId> {
    (start..end).filter_map(|id| Some(TokenId(u32::try_from(id).ok()?)))
}

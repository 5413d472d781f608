//! What becomes of each tensor of a checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use trainable_tokens_core::{EmbeddingSource as _, MergeCheck, TokenId, TokenRows};

use super::output::Output;
use super::table::TablePlan;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::file::SafetensorsFile;
use crate::lora::LoraDelta;
use crate::table::{ExtendedTable, MappedTable};

/// Changes of tensors, by the file that holds them and by where they start in it.
pub(super) struct Plan<'a> {
    base: &'a Checkpoint,
    check: MergeCheck,
    by_file: BTreeMap<PathBuf, BTreeMap<usize, TablePlan>>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(base: &'a Checkpoint, check: MergeCheck) -> Self {
        Self {
            base,
            check,
            by_file: BTreeMap::new(),
        }
    }

    /// Starts a tensor from another table than the checkpoint's.
    pub(super) fn start_from(&mut self, tensor: &str, source: ExtendedTable) -> Result<()> {
        let table = self.base.table(tensor)?;
        self.of(table).start_from(source);
        Ok(())
    }

    /// Extends a table of the checkpoint, and puts rows of its element type into the result.
    pub(super) fn extend(&mut self, table: &ExtendedTable, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        let plan = self.of(table.base().clone());
        plan.start_from(table.clone());
        plan.replace(ids, &rows.to_le_bytes())
    }

    /// The rows of a tensor in the result.
    pub(super) fn vocab_size(&self, tensor: &str) -> Result<usize> {
        let stored = self.base.stored_name(tensor);
        let planned = self.tables().find(|table| Some(table.name()) == stored);
        planned.map_or_else(
            || Ok(self.base.table(tensor)?.vocab_size()),
            |table| Ok(table.vocab_size()),
        )
    }

    /// The tensors with more rows than before, and their old and new numbers.
    pub(super) fn grown(&self) -> BTreeMap<&str, [usize; 2]> {
        let grown = self
            .tables()
            .filter_map(|table| Some((table.name(), table.grown()?)));
        grown.collect()
    }

    /// How many elements are added.
    pub(super) fn added_elements(&self) -> usize {
        self.tables().map(TablePlan::added_elements).sum()
    }

    /// How many bytes are added.
    pub(super) fn added_bytes(&self) -> usize {
        self.tables().map(TablePlan::added_bytes).sum()
    }

    /// Replaces rows of a table; `adapters` tells whose the row of a token is.
    pub(super) fn replace(
        &mut self,
        tensor: &str,
        ids: &[TokenId],
        rows: &TokenRows,
        adapters: impl Fn(TokenId) -> String,
    ) -> Result<()> {
        let table = self.base.table(tensor)?;
        rows.expect_shape("rows to merge", ids.len(), table.embedding_dim())?;
        let rows = rows.to_dtype(table.dtype());
        if self.check == MergeCheck::Finite
            && let Some((slot, column)) = rows.first_non_finite()
            && let Some(id) = ids.get(slot)
        {
            return Err(Error::NonFinite {
                adapters: adapters(*id),
                tensor: tensor.to_owned(),
                place: "token id",
                row: id.row(),
                column,
                dtype: table.dtype(),
            });
        }
        self.of(table).replace(ids, &rows.to_le_bytes())
    }

    /// Adds LoRA's weights of an adapter to a tensor, after those that were added before.
    pub(super) fn add(&mut self, adapter: &str, delta: LoraDelta) -> Result<()> {
        let table = self.base.table(delta.tensor())?;
        self.of(table).add(adapter, delta);
        Ok(())
    }

    fn of(&mut self, table: MappedTable) -> &mut TablePlan {
        let file = self.by_file.entry(table.path().to_owned()).or_default();
        let start = table.file_range().start;
        file.entry(start).or_insert_with(|| TablePlan::new(table))
    }

    fn tables(&self) -> impl Iterator<Item = &TablePlan> {
        self.by_file.values().flat_map(BTreeMap::values)
    }

    /// The names of the tensors that change.
    pub(super) fn tensors(&self) -> Vec<String> {
        let mut names: Vec<_> = self.tables().map(|table| table.name().to_owned()).collect();
        names.sort();
        names
    }

    /// How many rows are replaced.
    pub(super) fn num_rows(&self) -> usize {
        self.tables().map(TablePlan::num_rows).sum()
    }

    /// How many products of LoRA's weights are added.
    pub(super) fn num_deltas(&self) -> usize {
        self.tables().map(TablePlan::num_deltas).sum()
    }

    pub(super) fn touches(&self, path: &Path) -> bool {
        self.by_file.contains_key(path)
    }

    /// Writes the file with the changed tensors in their places.
    pub(super) fn write(&self, file: &SafetensorsFile, target: &Path) -> Result<()> {
        let mut out = Output::create(file, target)?;
        let mut at = 0;
        let grown = self.grown();
        if grown.keys().any(|name| file.contains(name)) {
            out.put(&file.header_with(&grown).map_err(Error::io("write", target))?)?;
            at = file.data_start();
        }
        let tables = self.by_file.get(file.path());
        for table in tables.into_iter().flat_map(BTreeMap::values) {
            let range = table.file_range();
            out.copy(at..range.start)?;
            table.write(self.check, &mut out)?;
            at = range.end;
        }
        out.copy(at..file.content().len())?;
        out.finish()
    }
}

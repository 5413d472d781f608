//! One tensor with changes, written block by block.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::ops::Range;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};

use half::{bf16, f16};
use trainable_tokens_core::{DType, Element, EmbeddingSource, HostTable as _, MergeCheck, RowRef, TokenId};

use super::output::Output;
use crate::error::{Error, Result};
use crate::lora::{LoraDelta, LowRank};
use crate::table::{ExtendedTable, MappedTable};

/// Bytes of a tensor that a thread works on at a time, if a row is not longer.
const BLOCK_BYTES: usize = 1 << 18;
/// Most threads that add weights of LoRA: more would only wait for the disk, and take memory for their blocks.
const MAX_THREADS: usize = 8;

/// What becomes of one tensor: first LoRA's weights are added, in the order of their adapters, then rows are replaced.
pub(super) struct TablePlan {
    /// Where it lies in the checkpoint.
    table: MappedTable,
    /// What it is before anything is added, if that is another table: larger, or from an adapter's file.
    source: Option<ExtendedTable>,
    deltas: Vec<(String, LoraDelta)>,
    rows: BTreeMap<TokenId, Row>,
}

struct Row {
    slot: usize,
    bytes: Vec<u8>,
}

impl TablePlan {
    pub(super) fn new(table: MappedTable) -> Self {
        Self {
            table,
            source: None,
            deltas: Vec::new(),
            rows: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, adapter: &str, delta: LoraDelta) {
        self.deltas.push((adapter.to_owned(), delta));
    }

    /// Starts from another table. The largest of several counts, and of those the last.
    pub(super) fn start_from(&mut self, source: ExtendedTable) {
        if source.vocab_size() >= self.vocab_size() {
            self.source = Some(source);
        }
    }

    /// The rows of the result.
    pub(super) fn vocab_size(&self) -> usize {
        let source = self.source.as_ref();
        source.map_or(self.table.vocab_size(), EmbeddingSource::vocab_size)
    }

    /// The rows before and in the result, if they are more.
    pub(super) fn grown(&self) -> Option<[usize; 2]> {
        let rows = [self.table.vocab_size(), self.vocab_size()];
        (rows[1] > rows[0]).then_some(rows)
    }

    /// How many elements are added.
    pub(super) fn added_elements(&self) -> usize {
        (self.vocab_size() - self.table.vocab_size()) * self.table.embedding_dim()
    }

    /// How many bytes are added.
    pub(super) fn added_bytes(&self) -> usize {
        self.added_elements() * self.table.dtype().size_in_bytes()
    }

    /// Replaces rows by those of `bytes`, one after another.
    pub(super) fn replace(&mut self, ids: &[TokenId], bytes: &[u8]) -> Result<()> {
        let size = self.row_bytes();
        for (slot, id) in ids.iter().enumerate() {
            match &self.source {
                Some(source) => source.check_ids(std::slice::from_ref(id))?,
                None => self.table.check_ids(std::slice::from_ref(id))?,
            }
            let row = bytes.get(slot * size..(slot + 1) * size).unwrap_or_default();
            let bytes = row.to_vec();
            if let Some(first) = self.rows.insert(*id, Row { slot, bytes }) {
                return Err(Error::Core(trainable_tokens_core::Error::DuplicateToken {
                    id: *id,
                    first: first.slot,
                    second: slot,
                }));
            }
        }
        Ok(())
    }

    pub(super) fn name(&self) -> &str {
        self.table.name()
    }

    pub(super) fn num_rows(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn num_deltas(&self) -> usize {
        self.deltas.len()
    }

    pub(super) fn file_range(&self) -> Range<usize> {
        self.table.file_range()
    }

    fn row_bytes(&self) -> usize {
        self.table.embedding_dim() * self.table.dtype().size_in_bytes()
    }

    /// Writes the tensor's bytes.
    pub(super) fn write<'a>(&'a self, check: MergeCheck, out: &mut Output<'a>) -> Result<()> {
        match self.table.dtype() {
            _ if self.is_copied(check) => self.copy(out),
            DType::F64 => self.write_sums::<f64>(check, out),
            DType::F32 => self.write_sums::<f32>(check, out),
            DType::F16 => self.write_sums::<f16>(check, out),
            DType::BF16 => self.write_sums::<bf16>(check, out),
        }
    }

    /// Whether all but the replaced rows, which were checked, can be copied from where they lie. Rows after the base's
    /// last are replaced ones.
    fn is_copied(&self, check: MergeCheck) -> bool {
        let may_copy = |source: &ExtendedTable| {
            let is_checked = check == MergeCheck::Unchecked || self.is_base(source.base());
            is_checked && source.dtype() == self.table.dtype()
        };
        self.deltas.is_empty() && self.source.as_ref().is_none_or(may_copy)
    }

    /// Whether a table is the one in the checkpoint.
    fn is_base(&self, table: &MappedTable) -> bool {
        (table.path(), table.file_range()) == (self.table.path(), self.file_range())
    }

    /// Copies what the tensor starts from, and has the replaced rows written over it.
    fn copy<'a>(&'a self, out: &mut Output<'a>) -> Result<()> {
        let (start, size) = (out.position(), self.row_bytes());
        match &self.source {
            None => out.copy(self.file_range())?,
            Some(source) => {
                if self.is_base(source.base()) {
                    out.copy(self.file_range())?;
                } else {
                    out.put(source.base().bytes())?;
                }
                out.put(&source.added().to_le_bytes())?;
            }
        }
        for (id, row) in &self.rows {
            out.patch(start + id.row() * size, &row.bytes);
        }
        Ok(())
    }

    /// Writes blocks in their order; as many as there are threads are computed at a time.
    fn write_sums<T: Element>(&self, check: MergeCheck, out: &mut Output<'_>) -> Result<()> {
        let deltas = self.deltas.iter().map(|(_, delta)| LowRank::<T>::new(delta));
        let deltas: Vec<_> = deltas.collect();
        let height = (BLOCK_BYTES / self.row_bytes().max(1)).max(1);
        let blocks = (0..self.vocab_size()).step_by(height);
        let blocks: Vec<_> = blocks
            .map(|start| start..(start + height).min(self.vocab_size()))
            .collect();
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let sums = &|block: &Range<usize>| self.sums(block.clone(), &deltas, check);
        for blocks in blocks.chunks(threads.min(MAX_THREADS)) {
            let computed: Vec<_> = thread::scope(|scope| {
                let (first, others) = blocks.split_at(1);
                let others = others.iter().map(|block| scope.spawn(move || sums(block)));
                let others: Vec<_> = others.collect();
                let first = first.iter().map(sums);
                let join = |thread: ScopedJoinHandle<'_, _>| {
                    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
                };
                first.chain(others.into_iter().map(join)).collect()
            });
            computed.into_iter().try_for_each(|bytes| out.put(&bytes?))?;
        }
        Ok(())
    }

    /// The bytes of some rows of the result.
    fn sums<T: Element>(
        &self,
        block: Range<usize>,
        deltas: &[LowRank<'_, T>],
        check: MergeCheck,
    ) -> Result<Vec<u8>> {
        let size = self.row_bytes();
        let mut values = vec![T::default(); block.len() * self.table.embedding_dim()];
        self.read(&block, &mut values);
        for delta in deltas {
            delta.add_to(block.clone(), &mut values);
        }
        if check == MergeCheck::Finite {
            self.expect_finite(block.start, &values)?;
        }
        let mut encoded = Vec::with_capacity(block.len() * size);
        values
            .iter()
            .for_each(|value| value.extend_le_bytes(&mut encoded));
        for (id, row) in self.rows_in(&block) {
            let place = (id.row() - block.start) * size;
            if let Some(place) = encoded.get_mut(place..place + size) {
                place.copy_from_slice(&row.bytes);
            }
        }
        Ok(encoded)
    }

    /// The replaced rows among these.
    fn rows_in(&self, block: &Range<usize>) -> impl Iterator<Item = (&TokenId, &Row)> {
        // Ids of 32 bits name every row.
        let id = |row: usize| TokenId(u32::try_from(row).unwrap_or(u32::MAX));
        self.rows.range(id(block.start)..id(block.end))
    }

    /// Reads rows of what the deltas are added to.
    fn read<T: Element>(&self, block: &Range<usize>, values: &mut [T]) {
        let Some(source) = &self.source else {
            return self.read_base(block, values);
        };
        for (row, values) in block
            .clone()
            .zip(values.chunks_exact_mut(self.table.embedding_dim().max(1)))
        {
            if let Some(row) = u32::try_from(row).ok().and_then(|id| source.row(TokenId(id))) {
                row.decode_into(values);
            }
        }
    }

    /// Reads rows of the base, as far as it has them.
    fn read_base<T: Element>(&self, block: &Range<usize>, values: &mut [T]) {
        let (bytes, size) = (self.table.bytes(), self.row_bytes());
        let range = (block.start * size).min(bytes.len())..(block.end * size).min(bytes.len());
        RowRef::Bytes(T::DTYPE, bytes.get(range).unwrap_or_default()).decode_into(values);
    }

    /// Refuses a value that is not finite where the base's is; rows that are replaced anyway were checked before.
    fn expect_finite<T: Element>(&self, first_row: usize, values: &[T]) -> Result<()> {
        let columns = self.table.embedding_dim().max(1);
        let mut old = vec![T::default(); values.len()];
        self.read_base(&(first_row..first_row + values.len() / columns), &mut old);
        let broken = values.iter().zip(old).enumerate().find(|(at, (new, old))| {
            let replaced =
                |row: usize| u32::try_from(row).is_ok_and(|id| self.rows.contains_key(&TokenId(id)));
            !new.to_f64().is_finite() && old.to_f64().is_finite() && !replaced(first_row + at / columns)
        });
        let Some((at, _)) = broken else {
            return Ok(());
        };
        let names: Vec<_> = self.deltas.iter().map(|(name, _)| name.as_str()).collect();
        Err(Error::NonFinite {
            adapters: names.join(" and "),
            tensor: self.table.name().to_owned(),
            place: "row",
            row: first_row + at / columns,
            column: at % columns,
            dtype: self.table.dtype(),
        })
    }
}

//! Tables that go wrong.

use trainable_tokens_core::{EmbeddingSource, TokenId, TokenRows, WriteRows};
use trainable_tokens_nested_vec::Result;

use crate::faulty::{Fault, Table};

/// Reads of the table.
macro_rules! reads {
    ($(#[$doc:meta] $name:ident: |$table:ident, $ids:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn read_rows(&self, $table: &Table<f32>, $ids: &[TokenId]) -> Result<TokenRows> {
                $body
            }
        }
    )+ };
}

fn map(mut rows: TokenRows, change: impl Fn(f32) -> f32) -> TokenRows {
    rows.as_mut_slice::<f32>()
        .unwrap_or_default()
        .iter_mut()
        .for_each(|x| *x = change(*x));
    rows
}

reads! {
    /// Takes the last row for ids beyond it.
    ClampedIds: |table, ids| {
        let last = u32::try_from(table.vocab_size()).unwrap_or(u32::MAX) - 1;
        table.now().read_rows(&ids.iter().map(|id| TokenId(id.0.min(last))).collect::<Vec<_>>())
    };
    /// Reads the rows as they were when the table was made: unmerging then restores these.
    StaleReads: |table, ids| table.first.read_rows(ids);
    /// Reads rows in ascending order.
    SortedReads: |table, ids| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        table.now().read_rows(&ids)
    };
    /// Reads several rows at once, but for the last: the first again.
    LongReadsWrap: |table, ids| {
        let mut ids = ids.to_vec();
        if let [first, .., last] = ids.as_mut_slice() {
            *last = *first;
        }
        table.now().read_rows(&ids)
    };
    /// Takes what is no number for zero.
    NanReadAsZero: |table, ids| Ok(map(table.now().read_rows(ids)?, |x| if x.is_nan() { 0.0 } else { x }));
    /// Copies the table for every read.
    TableCopied: |table, ids| table.now().clone().read_rows(ids);
    /// Loses the sign of zeros.
    MinusZeroUnread: |table, ids| Ok(map(table.now().read_rows(ids)?, |x| x + 0.0));
    /// Knows one NaN only.
    NanPayloadUnread: |table, ids| {
        Ok(map(table.now().read_rows(ids)?, |x| if x.is_nan() { f32::NAN } else { x }))
    };
}

/// Writes to the table.
macro_rules! writes {
    ($(#[$doc:meta] $name:ident: |$table:ident, $ids:ident, $rows:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn write_rows(&self, $table: &Table<f32>, $ids: &[TokenId], $rows: &TokenRows) -> Result<()> {
                $body
            }
        }
    )+ };
}

/// Row `at` of the rows.
fn one(rows: &TokenRows, at: usize) -> Result<TokenRows> {
    let dim = rows.embedding_dim();
    Ok(TokenRows::new(
        rows.to_f32_vec()[at * dim..][..dim].to_vec(),
        1,
        dim,
    )?)
}

writes! {
    /// Writes the row after the last one, too.
    NeighbourWritten: |table, ids, rows| {
        table.now.borrow_mut().write_rows(ids, rows)?;
        if let Some(last) = ids.iter().max().filter(|id| id.row() + 1 < table.vocab_size()) {
            table.now.borrow_mut().write_rows(&[TokenId(last.0 + 1)], &one(rows, 0)?)?;
        }
        Ok(())
    };
    /// Sorts the ids, but not the rows.
    SortedIds: |table, ids, rows| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        table.now.borrow_mut().write_rows(&ids, rows)
    };
    /// Writes row by row until one is refused.
    PartlyWritten: |table, ids, rows| {
        rows.expect_shape("rows", ids.len(), table.embedding_dim())?;
        if rows.dtype() != table.dtype() {
            return table.now.borrow_mut().write_rows(ids, rows);
        }
        let mut row_by_row = ids.iter().enumerate();
        row_by_row.try_for_each(|(at, id)| table.now.borrow_mut().write_rows(&[*id], &one(rows, at)?))
    };
    /// Takes rows of any type.
    AnyType: |table, ids, rows| table.now.borrow_mut().write_rows(ids, &rows.to_dtype(table.dtype()));
    /// Ignores ids beyond the table.
    IdsSkipped: |table, ids, rows| {
        rows.expect_shape("rows", ids.len(), table.embedding_dim())?;
        let known = ids.iter().enumerate().filter(|(_, id)| id.row() < table.vocab_size());
        let mut known = known.collect::<Vec<_>>().into_iter();
        if rows.dtype() != table.dtype() {
            return table.now.borrow_mut().write_rows(ids, rows);
        }
        known.try_for_each(|(at, id)| table.now.borrow_mut().write_rows(&[*id], &one(rows, at)?))
    };
    /// Loses the sign of zeros.
    MinusZeroUnwritten: |table, ids, rows| {
        if rows.dtype() != table.dtype() {
            return table.now.borrow_mut().write_rows(ids, rows);
        }
        table.now.borrow_mut().write_rows(ids, &map(rows.clone(), |x| x + 0.0))
    };
    /// Makes a new table with the rows in it.
    NewTable: |table, ids, rows| {
        let mut new = table.now().clone();
        new.write_rows(ids, rows)?;
        *table.now.borrow_mut() = new;
        Ok(())
    };
    /// Writes nothing.
    NothingWritten: |table, ids, rows| Ok(table.now().check_write(ids, rows)?);
}

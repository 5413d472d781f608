//! The frozen table.

use trainable_tokens_core::{EmbeddingSource, ErrorKind, TokenId, TokenRows, WriteRows};

use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, noise, odd_values, overwritten, select};
use crate::{Harness, Outcome};

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// The sizes and the element type are those of the values that the table was made of.
pub fn sizes_are_those_of_the_table<H: Harness>() -> Outcome {
    for_all(|world| {
        let source = H::source(&world.table::<H>())?;
        equal("vocab_size", &source.vocab_size(), &world.v)?;
        equal("embedding_dim", &source.embedding_dim(), &world.d)?;
        equal("dtype", &source.dtype(), &H::DTYPE)
    })
}

/// Rows are read bit for bit, in any order and as often as asked.
pub fn rows_are_read_bit_for_bit<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let source = H::source(&table)?;
        let rows = source.read_rows(&ids(&world.ids))?;
        same("rows", &rows, &select(&table, &world.ids)?)?;
        let none = source.read_rows(&[])?;
        same("no rows", &none, &TokenRows::zeros(H::DTYPE, 0, world.d))
    })
}

/// An id outside the vocabulary is refused by name.
pub fn reading_out_of_range_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(5, 3, &[], &[]);
    let source = H::source(&world.table::<H>())?;
    for id in [5, 6, u32::MAX] {
        let what = format!("reading row {id} of 5");
        refused(
            &what,
            source.read_rows(&ids(&[0, id])),
            ErrorKind::TokenOutOfRange,
        )?;
    }
    Ok(())
}

/// Writing rows changes these rows and no other bit.
pub fn writing_changes_no_other_row<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let mut source = H::source(&table)?;
        let rows = odd_values(world.seed + 1, H::DTYPE, world.tokens.len(), world.d);
        source.write_rows(&ids(&world.tokens), &rows)?;
        let all: Vec<u32> = (0u32..).take(world.v).collect();
        let now = source.read_rows(&ids(&all))?;
        same("the table", &now, &overwritten(&table, &world.tokens, &rows)?)
    })
}

/// Rows of another shape or type and ids out of range are refused, and no row changes.
pub fn a_refused_write_changes_nothing<H: Harness>() -> Outcome {
    let world = World::fixed(5, 3, &[], &[]);
    let table = world.table::<H>();
    let mut source = H::source(&table)?;
    let other = crate::cases::other_dtype(H::DTYPE);
    let rows = |dtype, rows, columns| noise(3, dtype, rows, columns);
    let writes = [
        (
            "too few rows",
            ids(&[1, 2]),
            rows(H::DTYPE, 1, 3),
            ErrorKind::Shape,
        ),
        (
            "rows too short",
            ids(&[1, 2]),
            rows(H::DTYPE, 2, 2),
            ErrorKind::Shape,
        ),
        ("another type", ids(&[1, 2]), rows(other, 2, 3), ErrorKind::DType),
        (
            "an id out of range",
            ids(&[1, 5]),
            rows(H::DTYPE, 2, 3),
            ErrorKind::TokenOutOfRange,
        ),
    ];
    for (what, ids, rows, kind) in writes {
        refused(what, source.write_rows(&ids, &rows), kind)?;
    }
    let now = source.read_rows(&ids(&[0, 1, 2, 3, 4]))?;
    same("the table after refused writes", &now, &table)
}

//! Saved rows, put over a table and taken off again.

use trainable_tokens_core::{DeltaStore, ErrorKind, TokenRows, TokenSet};

use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, lookup, noise, overwritten, select, whole};
use crate::{Harness, Layer, Outcome};

/// Given rows are used as they are and train in their own element type.
pub fn given_rows_keep_bits_and_type<H: Harness>() -> Outcome {
    for_all(|world| {
        for dtype in [H::DTYPE.default_row_dtype(), H::DTYPE] {
            let rows = world.rows_of(dtype);
            let source = H::source(&world.table::<H>())?;
            let layer = Layer::<H>::with_rows(source, world.token_set()?, &rows)?;
            equal("dtype", &layer.delta()?.dtype(), &dtype)?;
            same("rows", &layer.rows()?, &rows)?;
        }
        Ok(())
    })
}

/// Without given rows, they are the base's, in at least single precision.
pub fn new_rows_are_copies_of_the_bases<H: Harness>() -> Outcome {
    for_all(|world| {
        let want = select(&world.table::<H>(), &world.tokens)?;
        let rows = world.fresh::<H>()?.rows()?;
        same("rows", &rows, &want.to_dtype(H::DTYPE.default_row_dtype()))
    })
}

/// Switching to another adapter of the same tokens shows its rows and leaves the base alone.
pub fn adapters_of_the_same_tokens_switch<H: Harness>() -> Outcome {
    for_all(|world| {
        let (table, mut layer) = (world.table::<H>(), world.fresh::<H>()?);
        for seed in 0..3 {
            let rows = noise(seed, H::DTYPE.default_row_dtype(), world.tokens.len(), world.d);
            layer.set_rows(&rows)?;
            let want = select(&overwritten(&table, &world.tokens, &rows)?, &world.ids)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want)?;
            same("the base", &whole::<H>(&layer)?, &table)?;
        }
        Ok(())
    })
}

/// Rows of another type are converted to the type in which the layer's rows train.
pub fn other_types_are_converted<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let mut layer = world.fresh::<H>()?;
    let dtype = layer.delta()?.dtype();
    for other in crate::cases::DTYPES {
        let rows = noise(4, other, 2, 3);
        layer.set_rows(&rows)?;
        same("rows", &layer.rows()?, &rows.to_dtype(dtype))?;
    }
    Ok(())
}

/// One table serves one adapter after the other: taking a layer off gives the table back as it was.
pub fn one_table_serves_adapters_in_turn<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = world.table::<H>();
        let mut source = H::source(&table)?;
        let half = world.tokens.len() / 2;
        for tokens in [&world.tokens[..], &world.tokens[..half], &world.tokens[half..]] {
            let rows = noise(
                world.seed ^ 3,
                H::DTYPE.default_row_dtype(),
                tokens.len(),
                world.d,
            );
            let set = TokenSet::new(tokens.iter().copied(), world.v)?;
            let mut layer = Layer::<H>::with_rows(source, set, &rows)?;
            let want = select(&overwritten(&table, tokens, &rows)?, &world.ids)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want)?;
            layer.merge()?;
            layer.unmerge()?;
            source = layer.into_source();
        }
        let layer = Layer::<H>::new(source, TokenSet::new([], world.v)?)?;
        same("the table", &whole::<H>(&layer)?, &table)
    })
}

/// Merged adapters of disjoint tokens stay side by side in the table, in whatever order they were merged.
pub fn merged_adapters_of_disjoint_tokens_add_up<H: Harness>() -> Outcome {
    for_all(|world| {
        let (table, rows) = (world.table::<H>(), world.rows::<H>());
        let half = world.tokens.len() / 2;
        let slots: Vec<u32> = (0u32..).take(world.tokens.len()).collect();
        let parts = [
            (&world.tokens[..half], &slots[..half]),
            (&world.tokens[half..], &slots[half..]),
        ];
        for order in [[0, 1], [1, 0]] {
            let mut source = H::source(&table)?;
            for (tokens, slots) in order.map(|at| parts[at]) {
                let set = TokenSet::new(tokens.iter().copied(), world.v)?;
                let mut layer = Layer::<H>::with_rows(source, set, &select(&rows, slots)?)?;
                layer.merge()?;
                source = layer.into_source();
            }
            let layer = Layer::<H>::new(source, TokenSet::new([], world.v)?)?;
            same(
                "the table",
                &whole::<H>(&layer)?,
                &overwritten(&table, &world.tokens, &rows)?,
            )?;
        }
        Ok(())
    })
}

/// Rows that do not fit the tokens or the table are refused.
pub fn rows_that_do_not_fit_are_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let dtype = H::DTYPE.default_row_dtype();
    for (what, k, d) in [
        ("a row too few", 1, 3),
        ("a row too many", 3, 3),
        ("rows too long", 2, 4),
    ] {
        let source = H::source(&world.table::<H>())?;
        let rows = TokenRows::zeros(dtype, k, d);
        refused(
            what,
            Layer::<H>::with_rows(source, world.token_set()?, &rows),
            ErrorKind::Shape,
        )?;
        refused(what, world.fresh::<H>()?.set_rows(&rows), ErrorKind::Shape)?;
    }
    Ok(())
}

//! The trained rows.

use trainable_tokens_core::{Backend, DType, DeltaStore, EmbeddingSource, ErrorKind, TokenId, TokenRows};

use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, lookup, noise, odd_values};
use crate::{Harness, Outcome};

/// A new store holds the rows it was made of, bit for bit, in slot order.
pub fn holds_the_rows_it_was_made_of<H: Harness>() -> Outcome {
    for_all(|world| {
        let source = H::source(&world.table::<H>())?;
        for dtype in [H::DTYPE.default_row_dtype(), H::DTYPE] {
            let rows = odd_values(world.seed, dtype, world.tokens.len(), world.d);
            let delta = H::Backend::delta(&source, &rows)?;
            equal("num_rows", &delta.num_rows(), &world.tokens.len())?;
            equal("embedding_dim", &delta.embedding_dim(), &world.d)?;
            equal("dtype", &delta.dtype(), &dtype)?;
            same("rows", &delta.read()?, &rows)?;
        }
        Ok(())
    })
}

/// What is read is what was written last.
pub fn reads_what_was_written<H: Harness>() -> Outcome {
    for_all(|world| {
        let source = H::source(&world.table::<H>())?;
        let mut delta = H::Backend::delta(&source, &world.rows::<H>())?;
        for round in 0..3 {
            let rows = odd_values(world.seed ^ round, delta.dtype(), world.tokens.len(), world.d);
            delta.write(&rows)?;
            same("rows", &delta.read()?, &rows)?;
        }
        Ok(())
    })
}

/// Rows of another shape or type are refused, and the old ones stay.
pub fn a_refused_write_changes_nothing<H: Harness>() -> Outcome {
    let world = World::fixed(6, 3, &[4, 1], &[]);
    let source = H::source(&world.table::<H>())?;
    let rows = world.rows::<H>();
    let mut delta = H::Backend::delta(&source, &rows)?;
    let dtype = delta.dtype();
    refused(
        "a row too many",
        delta.write(&noise(1, dtype, 3, 3)),
        ErrorKind::Shape,
    )?;
    refused(
        "rows too long",
        delta.write(&noise(1, dtype, 2, 4)),
        ErrorKind::Shape,
    )?;
    let other = noise(1, crate::cases::other_dtype(dtype), 2, 3);
    refused("another type", delta.write(&other), ErrorKind::DType)?;
    same("rows after refused writes", &delta.read()?, &rows)?;
    equal("dtype", &delta.dtype(), &dtype)
}

/// An update sees the rows and replaces them.
pub fn an_update_sees_and_replaces<H: Harness>() -> Outcome {
    for_all(|world| {
        let source = H::source(&world.table::<H>())?;
        let rows = world.rows::<H>();
        let mut delta = H::Backend::delta(&source, &rows)?;
        let (next, mut seen) = (noise(5, rows.dtype(), world.tokens.len(), world.d), None);
        delta.update(&mut |rows| {
            seen = Some(rows.clone());
            rows.clone_from(&next);
            Ok(())
        })?;
        same("rows in the update", &seen.unwrap_or_else(|| next.clone()), &rows)?;
        same("rows after it", &delta.read()?, &next)
    })
}

/// The error of an update is handed on.
pub fn an_updates_error_is_handed_on<H: Harness>() -> Outcome {
    let world = World::fixed(6, 3, &[4, 1], &[]);
    let source = H::source(&world.table::<H>())?;
    let mut delta = H::Backend::delta(&source, &world.rows::<H>())?;
    refused(
        "the update",
        delta.update(&mut |_| Err(trainable_tokens_core::Error::NoGradient)),
        ErrorKind::NoGradient,
    )
}

/// A written row is seen by the next lookup.
pub fn a_written_row_is_seen_by_the_next_lookup<H: Harness>() -> Outcome {
    let world = World::fixed(6, 3, &[4, 1], &[]);
    let mut layer = world.fresh::<H>()?;
    for round in 0..3 {
        let rows = noise(round, layer.delta()?.dtype(), 2, 3);
        layer.set_rows(&rows)?;
        same("rows", &lookup::<H>(&layer, &[4, 1])?, &rows.to_dtype(H::DTYPE))?;
    }
    Ok(())
}

/// A NaN stays a NaN through every conversion, whatever its payload, and other values stay numbers.
pub fn a_nan_stays_a_nan<H: Harness>() -> Outcome {
    let world = World::fixed(6, 4, &[4, 1], &[1, 0, 4]);
    for dtype in crate::cases::DTYPES {
        // Quiet ones, and ones that a conversion by cutting bits off would make an infinity.
        let patterns: [u64; 4] = match dtype {
            DType::F64 => [
                0x7ff0_0000_0000_0001,
                0x7ff8 << 48,
                1 << 62,
                0xfff0_0000_0000_0001,
            ],
            DType::F32 => [0x7f80_0001, 0x7fc0 << 16, 1 << 30, 0xff80_0001],
            DType::F16 => [0x7c01, 0x7e00, 1 << 14, 0xfc01],
            DType::BF16 => [0x7f81, 0x7fc0, 1 << 14, 0xff81],
        };
        let size = dtype.size_in_bytes();
        let row = patterns.map(|bits| bits.to_le_bytes()[..size].to_vec()).concat();
        let rows = TokenRows::from_le_bytes(dtype, 2, 4, &[row.clone(), row].concat())?;
        let nans = |what: &str, rows: &TokenRows| {
            let nans: Vec<bool> = rows.to_f64_vec().iter().map(|x| x.is_nan()).collect();
            let want = [true, true, false, true].repeat(rows.num_rows());
            equal(&format!("{what} of {dtype} that are NaN"), &nans, &want)
        };
        let mut layer = world.fresh::<H>()?;
        layer.set_rows(&rows)?;
        nans("trained rows", &layer.rows()?)?;
        nans("looked-up rows", &lookup::<H>(&layer, &world.tokens)?)?;
        layer.merge()?;
        nans(
            "merged rows",
            &layer.source().read_rows(&[TokenId(4), TokenId(1)])?,
        )?;
    }
    Ok(())
}

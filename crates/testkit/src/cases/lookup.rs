//! The rows of a batch.

use trainable_tokens_core::{EmbedScale, LayerOptions, MaxNorm, TokenRows, TokenSet};

use crate::failure::{Exact, close, ensure, same};
use crate::world::{World, for_all, lookup, noise, odd_values, overwritten, select, whole};
use crate::{Harness, Layer, Outcome};

/// A new layer returns the base's rows, bit for bit.
pub fn untrained_rows_are_a_no_op<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let layer = world.over::<H>(&table)?;
        same(
            "rows",
            &lookup::<H>(&layer, &world.ids)?,
            &select(&table, &world.ids)?,
        )
    })
}

/// The rows of a batch are those of the table with the trained rows written into it: they replace, they do not add.
pub fn trained_rows_replace_the_base<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let want = select(&world.dense::<H>()?, &world.ids)?;
        same("rows", &lookup::<H>(&layer, &world.ids)?, &want)
    })
}

/// Zeros of either sign, infinities, NaN and subnormal numbers pass as they are, from base and trained rows.
pub fn odd_values_pass_unchanged<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let rows = odd_values(world.seed + 3, H::DTYPE, world.tokens.len(), world.d);
        let source = H::source(&table)?;
        let layer = Layer::<H>::with_rows(source, world.token_set()?, &rows)?;
        let want = select(&overwritten(&table, &world.tokens, &rows)?, &world.ids)?;
        same("rows", &lookup::<H>(&layer, &world.ids)?, &want)
    })
}

/// Rows that train in another type than the table's come out rounded as the table would hold them.
pub fn trained_rows_are_rounded_as_the_table_would<H: Harness>() -> Outcome {
    for_all(|world| {
        for dtype in [H::DTYPE.default_row_dtype(), H::DTYPE] {
            let (table, rows) = (world.table::<H>(), world.rows_of(dtype));
            let layer = Layer::<H>::with_rows(H::source(&table)?, world.token_set()?, &rows)?;
            let want = select(&overwritten(&table, &world.tokens, &rows)?, &world.ids)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want)?;
        }
        Ok(())
    })
}

/// Row `i` belongs to the token given as number `i`, whatever the order of the ids.
pub fn rows_belong_to_tokens_in_the_order_given<H: Harness>() -> Outcome {
    let orders: [&[u32]; 4] = [&[9, 2, 5], &[2, 5, 9], &[5, 9, 2], &[9, 5, 2]];
    for tokens in orders {
        let world = World::fixed(10, 4, tokens, tokens);
        let rows = world.rows::<H>();
        let layer = world.trained::<H>()?;
        let got = lookup::<H>(&layer, tokens)?;
        same(&format!("rows of {tokens:?}"), &got, &rows.to_dtype(H::DTYPE))?;
    }
    Ok(())
}

/// With no trainable token the layer is the base.
pub fn no_token_is_the_plain_lookup<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let none = TokenSet::new([], world.v)?;
        let layer = Layer::<H>::new(H::source(&table)?, none)?;
        same(
            "rows",
            &lookup::<H>(&layer, &world.ids)?,
            &select(&table, &world.ids)?,
        )
    })
}

/// With every token trainable, no row of the base is seen.
pub fn every_token_may_train<H: Harness>() -> Outcome {
    let all: Vec<u32> = (0..9).rev().collect();
    let world = World::fixed(9, 3, &all, &[0, 8, 3, 3, 1]);
    let layer = world.trained::<H>()?;
    let want = select(&world.dense::<H>()?, &world.ids)?;
    same("rows", &lookup::<H>(&layer, &world.ids)?, &want)
}

/// An empty batch gives no rows; a batch of one gives one.
pub fn batches_may_be_empty_or_single<H: Harness>() -> Outcome {
    let world = World::fixed(6, 3, &[4, 1], &[]);
    let layer = world.trained::<H>()?;
    let none = lookup::<H>(&layer, &[])?;
    same("no rows", &none, &TokenRows::zeros(H::DTYPE, 0, 3))?;
    for id in [0, 1, 4, 5] {
        same(
            "one row",
            &lookup::<H>(&layer, &[id])?,
            &select(&world.dense::<H>()?, &[id])?,
        )?;
    }
    Ok(())
}

/// A lookup changes nothing: the next one gives the same bits, and the base is as it was.
pub fn a_lookup_changes_nothing<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let plan = layer.plan(&world.ids)?;
        let first = H::read(&layer.lookup_planned(&plan)?)?;
        let second = H::read(&layer.lookup_planned(&plan)?)?;
        same("the second lookup", &second, &first)?;
        same("the base", &whole::<H>(&layer)?, &world.table::<H>())?;
        same("the trained rows", &layer.rows()?, &world.rows::<H>())
    })
}

/// The embedding's factor multiplies frozen and trained rows alike, after the override.
pub fn a_scale_applies_after_the_override<H: Harness>() -> Outcome {
    for_all(|world| {
        for scale in [
            EmbedScale::Exact(5.656_854_2),
            EmbedScale::TableDType(5.656_854_2),
        ] {
            let options = LayerOptions {
                scale: Some(scale),
                ..LayerOptions::default()
            };
            let layer = world.trained::<H>()?.with_options(options);
            let mut want = select(&world.dense::<H>()?, &world.ids)?;
            want.scale(scale.factor(H::DTYPE));
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want)?;
        }
        Ok(())
    })
}

/// Rows longer than `max_norm` are shortened to it, frozen and trained ones alike; shorter ones keep their bits.
pub fn max_norm_shortens_rows<H: Harness>() -> Outcome {
    for_all(|world| {
        let limit = 0.8;
        let options = LayerOptions {
            max_norm: Some(MaxNorm::new(limit)?),
            ..LayerOptions::default()
        };
        let layer = world.trained::<H>()?.with_options(options);
        let plain = select(&world.dense::<H>()?, &world.ids)?;
        let mut want = Exact::of(&plain);
        let mut short = Vec::new();
        for (at, norm) in plain.row_norms().into_iter().enumerate() {
            if norm > limit {
                want.row_mut(at)
                    .iter_mut()
                    .for_each(|x| *x *= limit / (norm + 1e-7));
            } else {
                short.push(u32::try_from(at)?);
            }
        }
        let got = lookup::<H>(&layer, &world.ids)?;
        close("rows", &got, &want, H::DTYPE)?;
        same("short rows", &select(&got, &short)?, &select(&plain, &short)?)?;
        same("the base", &whole::<H>(&layer)?, &world.table::<H>())?;
        same("the trained rows", &layer.rows()?, &world.rows::<H>())
    })
}

/// `max_norm` comes before the scale: the product may be longer.
pub fn max_norm_comes_before_the_scale<H: Harness>() -> Outcome {
    let world = World::fixed(6, 4, &[4, 1], &[4, 0, 1, 5]);
    let options = LayerOptions {
        max_norm: Some(MaxNorm::new(0.5)?),
        scale: Some(EmbedScale::Exact(8.0)),
        ..LayerOptions::default()
    };
    let layer = Layer::<H>::new(H::source(&noise(1, H::DTYPE, 6, 4))?, world.token_set()?)?;
    let got = lookup::<H>(&layer.with_options(options), &world.ids)?;
    for (at, norm) in got.row_norms().into_iter().enumerate() {
        ensure!(
            (norm - 4.0).abs() <= 0.1,
            "row {at} has norm {norm}, expected 8 times 0.5"
        );
    }
    Ok(())
}

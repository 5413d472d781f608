//! What counts for tokens that several active adapters train.

use trainable_tokens_core::{DType, EmbedScale, LayerOptions, MaxNorm, Overlap};

use super::team::{NAMES, WEIGHTS, active, disjoint, in_effect, overlapping, trains_in};
use crate::cases::DTYPES;
use crate::cases::head::product;
use crate::failure::{close, equal, same};
use crate::world::{World, for_all, logits, lookup, noise, overwritten, select};
use crate::{Harness, Layer, Outcome};

/// All adapters active at once, their rows of this type: the lookup has the bits of the dense definition.
fn together<H: Harness>(world: &World, dtype: DType, overlap: &Overlap) -> Outcome {
    let members = overlapping(world, dtype);
    let layer = active::<H>(world, &members, overlap)?;
    equal("the overlap policy", layer.overlap(), overlap)?;
    let dense = in_effect(&world.table::<H>(), &members, overlap)?;
    let got = lookup::<H>(&layer, &world.ids)?;
    same("rows", &got, &select(&dense, &world.ids)?)
}

/// If asked, the row of a token that several adapters train is that of the last of them.
pub fn the_last_of_overlapping_adapters_wins<H: Harness>() -> Outcome {
    for_all(|world| {
        for dtype in [H::DTYPE.default_row_dtype(), H::DTYPE] {
            together::<H>(world, dtype, &Overlap::LastWins)?;
        }
        Ok(())
    })
}

/// If asked, the row of a token that several adapters train is their weighted mean, each product and each sum rounded.
pub fn overlapping_rows_are_averaged_by_weight<H: Harness>() -> Outcome {
    for_all(|world| {
        let weights = [
            WEIGHTS,
            [1.0; 3],
            [f64::MAX, f64::MAX, f64::MAX / 3.0],
            [1e-300, 2e-300, 7e-300],
        ];
        for weights in weights {
            for dtype in [H::DTYPE.default_row_dtype(), H::DTYPE] {
                together::<H>(world, dtype, &Overlap::WeightedMean(weights.to_vec()))?;
            }
        }
        Ok(())
    })
}

/// Adapters whose rows train in different types act together: their rows first take a type that holds all of them.
pub fn adapters_of_several_types_act_together<H: Harness>() -> Outcome {
    let mut dtypes = Vec::new();
    for dtype in DTYPES {
        dtypes.extend(trains_in::<H>(dtype)?.then_some(dtype));
    }
    for_all(|world| {
        let overlaps = [Overlap::LastWins, Overlap::WeightedMean(WEIGHTS.to_vec())];
        for (types, overlap) in [[0, 1, 2], [3, 2, 3], [1, 3, 1], [2, 2, 2]]
            .iter()
            .flat_map(|types| overlaps.iter().map(move |overlap| (types, overlap)))
        {
            let mut members = overlapping(world, DType::F64);
            for (member, at) in members.iter_mut().zip(types) {
                member.rows = member.rows.to_dtype(dtypes[*at % dtypes.len()]);
            }
            let layer = active::<H>(world, &members, overlap)?;
            let dense = in_effect(&world.table::<H>(), &members, overlap)?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same("rows", &got, &select(&dense, &world.ids)?)?;
            for member in &members {
                same("trained rows", &layer.adapter(member.name)?.rows()?, &member.rows)?;
            }
        }
        Ok(())
    })
}

/// The layer's options apply to the rows in effect as to those of one adapter.
pub fn options_apply_to_the_rows_in_effect<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = disjoint(world, H::DTYPE.default_row_dtype());
        let options = LayerOptions {
            scale: Some(EmbedScale::TableDType(1.7)),
            max_norm: Some(MaxNorm::new(0.6)?),
            ..LayerOptions::default()
        };
        let layer = active::<H>(world, &members, &Overlap::Refuse)?.with_options(options);
        let dense = in_effect(&world.table::<H>(), &members, &Overlap::Refuse)?;
        let merged = Layer::<H>::frozen(H::source(&dense)?)?.with_options(options);
        same(
            "rows",
            &lookup::<H>(&layer, &world.ids)?,
            &lookup::<H>(&merged, &world.ids)?,
        )
    })
}

/// The logits are `hidden · Wᵀ` for the table with the rows in effect written into it, whatever counts for overlaps; the
/// columns of other rows keep the frozen head's bits.
pub fn the_head_sees_the_rows_in_effect<H: Harness>() -> Outcome {
    for_all(|world| {
        let (table, hidden) = (world.table::<H>(), world.hidden::<H>());
        let dtype = H::DTYPE.default_row_dtype();
        for (members, overlap) in [
            (disjoint(world, dtype), Overlap::Refuse),
            (overlapping(world, dtype), Overlap::LastWins),
            (overlapping(world, dtype), Overlap::WeightedMean(WEIGHTS.to_vec())),
        ] {
            let layer = active::<H>(world, &members, &overlap)?;
            let want = product(&hidden, &in_effect(&table, &members, &overlap)?);
            close("logits", &logits::<H>(&layer, &hidden)?, &want, H::DTYPE)?;
        }
        // Every adapter of every token: only the last one is seen, and so are rows that it gets later.
        let all: Vec<u32> = (0u32..).take(world.v).collect();
        let mut layer = Layer::<H>::frozen(H::source(&table)?)?;
        for name in NAMES {
            let tokens = trainable_tokens_core::TokenSet::new(all.iter().copied(), world.v)?;
            layer.add_adapter(name, tokens)?;
        }
        layer.activate_overlapping(&NAMES, Overlap::LastWins)?;
        for (name, salt) in NAMES.into_iter().zip(0..) {
            let rows = noise(world.seed + salt, dtype, world.v, world.d);
            layer.adapter_mut(name)?.set_rows(&rows)?;
            let seen = if name == NAMES[2] {
                overwritten(&table, &all, &rows)?
            } else {
                table.clone()
            };
            let got = logits::<H>(&layer, &hidden)?;
            close("logits of all tokens", &got, &product(&hidden, &seen), H::DTYPE)?;
        }
        Ok(())
    })
}

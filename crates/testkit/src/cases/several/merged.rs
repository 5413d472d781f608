//! Adapters written into the table, several at once and above each other.

use trainable_tokens_core::{DType, ErrorKind, MergeCheck, Overlap, TokenRows};

use super::team::{Member, WEIGHTS, active, disjoint, idle, in_effect, names, over, overlapping, trains_in};
use crate::cases::DTYPES;
use crate::failure::{Failure, equal, refused_naming, same};
use crate::world::{World, for_all, lookup, noise, odd_values, overwritten, select, whole};
use crate::{Harness, Layer, Outcome};

fn merges<H: Harness>(layer: &Layer<H>) -> Vec<Vec<&str>> {
    layer.merges().map(Iterator::collect).collect()
}

/// Several adapters are merged as one: the table then holds the rows that would be in effect, and one unmerge restores
/// every bit of it.
pub fn several_adapters_merge_as_one_entry<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let dtype = H::DTYPE.default_row_dtype();
        for (members, overlap) in [
            (disjoint(world, dtype), Overlap::Refuse),
            (overlapping(world, dtype), Overlap::LastWins),
            (overlapping(world, dtype), Overlap::WeightedMean(WEIGHTS.to_vec())),
        ] {
            let dense = in_effect(&table, &members, &overlap)?;
            for by_name in [false, true] {
                let mut layer = over::<H>(&table, &members)?;
                layer.activate_overlapping(&names(&members), overlap.clone())?;
                let before = lookup::<H>(&layer, &world.ids)?;
                if by_name {
                    layer.activate(&[])?;
                    layer.merge_adapters(&names(&members), &overlap, MergeCheck::Unchecked)?;
                } else {
                    layer.merge()?;
                }
                equal("the merges", &merges::<H>(&layer), &vec![names(&members)])?;
                same("the merged table", &whole::<H>(&layer)?, &dense)?;
                same("rows while merged", &lookup::<H>(&layer, &world.ids)?, &before)?;
                layer.unmerge()?;
                equal("is_merged", &layer.is_merged(), &false)?;
                same("the table", &whole::<H>(&layer)?, &table)?;
                for member in &members {
                    same("trained rows", &layer.adapter(member.name)?.rows()?, &member.rows)?;
                }
            }
        }
        Ok(())
    })
}

/// Merges above each other are undone from the latest to the first, each to the very bits that it overwrote.
pub fn stacked_merges_are_undone_in_order<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let mut layer = idle::<H>(world, &members)?;
        let mut tables = vec![world.table::<H>()];
        for member in &members {
            layer.merge_adapters(&[member.name], &Overlap::LastWins, MergeCheck::Finite)?;
            let last = tables.last().ok_or("no table")?;
            tables.push(overwritten(last, &member.tokens, &member.rows)?);
        }
        for merged in (1..=members.len()).rev() {
            let stack: Vec<_> = names(&members[..merged])
                .into_iter()
                .map(|name| vec![name])
                .collect();
            equal("the merges", &merges::<H>(&layer), &stack)?;
            same("the table", &whole::<H>(&layer)?, &tables[merged])?;
            let want = select(&tables[merged], &world.ids)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &want)?;
            for (member, at) in members.iter().zip(0..) {
                let is_merged = layer.adapter(member.name)?.is_merged();
                equal(
                    &format!("{:?} is merged", member.name),
                    &is_merged,
                    &(at < merged),
                )?;
            }
            layer.unmerge()?;
        }
        same("the table", &whole::<H>(&layer)?, &tables[0])
    })
}

/// Active adapters that are not merged stay in effect above the rows in the table, of active and inactive ones, and the
/// last merge wins there.
pub fn merged_and_active_adapters_act_together<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let base = world.table::<H>();
        for merged in 0..3 {
            // One of the active adapters: its rows go below those of the others.
            let mut layer = active::<H>(world, &members, &Overlap::LastWins)?;
            layer.merge_adapters(&[members[merged].name], &Overlap::LastWins, MergeCheck::Unchecked)?;
            let table = overwritten(&base, &members[merged].tokens, &members[merged].rows)?;
            same("the table", &whole::<H>(&layer)?, &table)?;
            let mut others: Vec<Member> = members.clone();
            others.remove(merged);
            for active in [&others[..], &others[..1], &others[..0]] {
                layer.activate_overlapping(&names(active), Overlap::LastWins)?;
                let dense = in_effect(&table, active, &Overlap::LastWins)?;
                let got = lookup::<H>(&layer, &world.ids)?;
                same(
                    &format!("rows with {:?} above", names(active)),
                    &got,
                    &select(&dense, &world.ids)?,
                )?;
            }
            layer.unmerge()?;
            layer.activate_overlapping(&names(&members), Overlap::LastWins)?;
            let dense = in_effect(&base, &members, &Overlap::LastWins)?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same("rows after unmerging", &got, &select(&dense, &world.ids)?)?;
        }
        // Weights count among the adapters that are not merged.
        for merged in 0..3 {
            let mut layer = active::<H>(world, &members, &Overlap::WeightedMean(WEIGHTS.to_vec()))?;
            layer.merge_adapters(&[members[merged].name], &Overlap::LastWins, MergeCheck::Unchecked)?;
            let table = overwritten(&base, &members[merged].tokens, &members[merged].rows)?;
            let (mut others, mut weights) = (members.clone(), WEIGHTS.to_vec());
            others.remove(merged);
            weights.remove(merged);
            let dense = in_effect(&table, &others, &Overlap::WeightedMean(weights))?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same("averaged rows above", &got, &select(&dense, &world.ids)?)?;
            layer.unmerge()?;
            let dense = in_effect(&base, &members, layer.overlap())?;
            let got = lookup::<H>(&layer, &world.ids)?;
            same(
                "averaged rows after unmerging",
                &got,
                &select(&dense, &world.ids)?,
            )?;
        }
        Ok(())
    })
}

/// A value that the table's type rounds to an infinity, though it is finite as it trains.
fn too_large(dtype: DType) -> Option<f64> {
    match dtype {
        DType::F64 => None,
        DType::F32 => Some(f64::MAX),
        DType::F16 => Some(65_520.0),
        DType::BF16 => Some(3.4e38),
    }
}

/// Rows of zeros but for one value.
fn with_value(dtype: DType, [k, d]: [usize; 2], at: usize, value: f64) -> Result<TokenRows, Failure> {
    let mut values = vec![0.0; k * d];
    values[at] = value;
    Ok(TokenRows::new(values, k, d)?.to_dtype(dtype))
}

/// A checked merge refuses a value that is not finite in the table's type by adapters, token and column, and writes
/// nothing; a value that is finite there passes.
pub fn a_checked_merge_names_the_culprit<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2, 4], &[5, 2, 4, 0]);
    let table = world.table::<H>();
    let mut values = vec![
        (f64::NAN, DType::F64),
        (f64::INFINITY, H::DTYPE.default_row_dtype()),
    ];
    values.push((f64::NEG_INFINITY, H::DTYPE));
    // In single precision 3.4e38 is finite; a row of double precision may be too large for a table of single.
    let wide = if H::DTYPE == DType::F32 {
        DType::F64
    } else {
        DType::F32
    };
    values.extend(too_large(H::DTYPE).map(|value| (value, wide)));
    for (value, dtype) in values {
        if !trains_in::<H>(dtype)? {
            continue;
        }
        let mut members = disjoint(&world, dtype);
        for (member, tokens) in members.iter_mut().zip([&[5, 2][..], &[4], &[1, 6]]) {
            member.tokens = tokens.to_vec();
            member.rows = noise(3, dtype, tokens.len(), 3);
        }
        members[0].rows = with_value(dtype, [2, 3], 5, value)?;
        let mut layer = idle::<H>(&world, &members)?;
        for merged in [&members[..1], &members[..2]] {
            layer.activate(&names(merged))?;
            let before = lookup::<H>(&layer, &world.ids)?;
            let words = [members[0].name, "token id 2", "column 2"];
            let what = format!("merging {value} of {dtype}");
            let checked = layer.merge_checked(MergeCheck::Finite);
            refused_naming(&what, checked, ErrorKind::NonFinite, &words)?;
            equal("is_merged", &layer.is_merged(), &false)?;
            same("the table", &whole::<H>(&layer)?, &table)?;
            same("rows", &lookup::<H>(&layer, &world.ids)?, &before)?;
        }
        layer.merge_adapters(&[members[1].name], &Overlap::Refuse, MergeCheck::Finite)?;
        layer.unmerge()?;
        // Unchecked, the value is written as it is.
        layer.merge()?;
        let dense = in_effect(&table, &members[..2], &Overlap::Refuse)?;
        let finite = |rows: &TokenRows| rows.to_f64_vec().iter().filter(|x| x.is_finite()).count();
        equal(
            "finite values in the table",
            &finite(&whole::<H>(&layer)?),
            &finite(&dense),
        )?;
    }
    Ok(())
}

/// What a checked merge does not write, it does not look at: NaN and infinities elsewhere in the table, and in rows that
/// another adapter's take the place of.
pub fn a_checked_merge_looks_at_the_rows_written_only<H: Harness>() -> Outcome {
    let table = odd_values(3, H::DTYPE, 7, 3);
    let world = World::fixed(7, 3, &[5, 2], &[5, 2, 0, 1, 3, 4, 6]);
    for dtype in DTYPES {
        if !trains_in::<H>(dtype)? {
            continue;
        }
        let mut members = disjoint(&world, dtype);
        members.truncate(2);
        for member in &mut members {
            member.tokens.clone_from(&world.tokens);
            member.rows = noise(4, dtype, 2, 3);
        }
        members[0].rows = with_value(dtype, [2, 3], 0, f64::NAN)?;
        let mut layer = over::<H>(&table, &members)?;
        layer.merge_adapters(&names(&members), &Overlap::LastWins, MergeCheck::Finite)?;
        let dense = in_effect(&table, &members, &Overlap::LastWins)?;
        same("the merged table", &whole::<H>(&layer)?, &dense)?;
        same(
            "rows",
            &lookup::<H>(&layer, &world.ids)?,
            &select(&dense, &world.ids)?,
        )?;
        layer.unmerge()?;
        same("the table", &whole::<H>(&layer)?, &table)?;
    }
    Ok(())
}

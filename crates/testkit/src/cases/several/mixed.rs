//! Batches whose examples choose their adapters.

use trainable_tokens_core::{EmbedScale, LayerOptions, MaxNorm, Overlap, TokenRows};

use super::team::{Dice, Member, idle, in_effect, names, overlapping};
use crate::cases::head::product;
use crate::failure::{Exact, close, equal, same};
use crate::world::{World, for_all, lookup, lookup_mixed, noise, select};
use crate::{Failure, Harness, Outcome};

/// Which adapter, or none, each of this many examples chooses, and how long each example of the world's ids is; ids that
/// are left over belong to no example.
pub(super) fn choose(world: &World, members: &[Member], examples: usize) -> (Vec<Option<usize>>, usize) {
    let mut dice = Dice::new(world.seed ^ 0xeca1);
    let choice = (0..examples).map(|_| Some(dice.below(4)).filter(|at| *at < members.len()));
    (choice.collect(), world.ids.len() / examples)
}

/// The choice by name, as the layer takes it.
pub(super) fn by_name(members: &[Member], choice: &[Option<usize>]) -> Vec<Option<&'static str>> {
    choice.iter().map(|at| at.map(|at| members[at].name)).collect()
}

/// The table that an example sees.
pub(super) fn seen(
    table: &TokenRows,
    members: &[Member],
    choice: Option<usize>,
) -> Result<TokenRows, Failure> {
    let chosen = choice.map_or(&members[..0], |at| &members[at..=at]);
    in_effect(table, chosen, &Overlap::Refuse)
}

/// An example's output rows are those of the table with the rows of the adapter that it chose, or of the table, bit for
/// bit, whichever adapters are active and whatever types their rows have.
pub fn examples_see_the_adapters_that_they_choose<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut members = overlapping(world, H::DTYPE.default_row_dtype());
        members[2].rows = members[2].rows.to_dtype(H::DTYPE);
        let mut layer = idle::<H>(world, &members)?;
        for active in [&members[..0], &members[..1], &members[2..]] {
            layer.activate(&names(active))?;
            for examples in [1, 2, 5] {
                let (choice, length) = choose(world, &members, examples);
                let ids = &world.ids[..examples * length];
                let got = lookup_mixed::<H>(&layer, ids, &by_name(&members, &choice))?;
                equal("shape", &got.shape(), &[ids.len(), world.d])?;
                for (example, choice) in choice.iter().enumerate() {
                    let positions = (0u32..).skip(example * length).take(length);
                    let got = select(&got, &positions.collect::<Vec<_>>())?;
                    let table = seen(&world.table::<H>(), &members, *choice)?;
                    let ids = &ids[example * length..][..length];
                    let what = format!("example {example} of {examples}, which chose {choice:?}");
                    same(&what, &got, &select(&table, ids)?)?;
                }
            }
        }
        for member in &members {
            same("trained rows", &layer.adapter(member.name)?.rows()?, &member.rows)?;
        }
        Ok(())
    })
}

/// The layer's options apply to every example: each has the bits of the run in which its adapter alone is active. A plan
/// serves again when rows were rewritten.
pub fn options_apply_to_mixed_batches<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let options = LayerOptions {
            scale: Some(EmbedScale::Exact(1.7)),
            max_norm: Some(MaxNorm::new(0.6)?),
            ..LayerOptions::default()
        };
        let mut layer = idle::<H>(world, &members)?.with_options(options);
        let (choice, length) = choose(world, &members, 3);
        let plan = layer.plan_mixed(&world.ids[..3 * length], &by_name(&members, &choice))?;
        for round in 0..2 {
            let got = H::read(&layer.lookup_planned(&plan)?)?;
            for (example, choice) in choice.iter().enumerate() {
                let chosen = choice.map_or(&members[..0], |at| &members[at..=at]);
                layer.activate(&names(chosen))?;
                let positions: Vec<u32> = (0u32..).skip(example * length).take(length).collect();
                let want = lookup::<H>(&layer, &world.ids[example * length..][..length])?;
                same(&format!("example {example}"), &select(&got, &positions)?, &want)?;
            }
            for member in &members {
                let rows = noise(round, member.rows.dtype(), member.tokens.len(), world.d);
                layer.adapter_mut(member.name)?.set_rows(&rows)?;
            }
        }
        Ok(())
    })
}

/// The logits of an example are those of the table with the rows of the adapter that it chose, or of the table.
pub fn a_mixed_head_projects_by_the_adapters_of_its_examples<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let layer = idle::<H>(world, &members)?;
        for (examples, length) in [(1, 2), (4, 1), (5, 2)] {
            let (choice, _) = choose(world, &members, examples);
            let hidden = noise(world.seed ^ 0x77, H::DTYPE, examples * length, world.d);
            let logits = layer.logits_mixed(H::hidden(&layer, &hidden)?, &by_name(&members, &choice))?;
            let mut want = Exact::zeros(examples * length, world.v);
            for (example, choice) in choice.iter().enumerate() {
                let table = seen(&world.table::<H>(), &members, *choice)?;
                let all = product(&hidden, &table);
                for row in example * length..(example + 1) * length {
                    want.row_mut(row).copy_from_slice(all.row(row));
                }
            }
            close("logits", &H::read(&logits)?, &want, H::DTYPE)?;
        }
        Ok(())
    })
}

/// A mixed batch may have no example, and examples may be empty, in lookup and head.
pub fn mixed_batches_may_be_empty<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let members = overlapping(&world, H::DTYPE.default_row_dtype());
    let layer = idle::<H>(&world, &members)?;
    let none = TokenRows::zeros(H::DTYPE, 0, 3);
    for adapters in [
        &[][..],
        &[None],
        &[Some(members[0].name), None, Some(members[1].name)],
    ] {
        same("no rows", &lookup_mixed::<H>(&layer, &[], adapters)?, &none)?;
        let logits = layer.logits_mixed(H::hidden(&layer, &none)?, adapters)?;
        same("no logits", &H::read(&logits)?, &TokenRows::zeros(H::DTYPE, 0, 7))?;
    }
    Ok(())
}

//! The gradients of several adapters that act together.

use trainable_tokens_core::{BackendError, DType, ErrorKind, MergeCheck, Overlap, Sgd, SgdConfig, TokenRows};

use super::team::{
    Member, WEIGHTS, active, add, add_lookup, disjoint, in_effect, overlapping, shares, trains_in,
};
use crate::cases::head::dense_gradients;
use crate::failure::{Exact, close, close_within, ensure, equal, refused, same, tolerance};
use crate::world::{World, for_all, lookup, noise, select, whole};
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass, PassGradients};

/// Two lookups and a head of one pass, and the gradient that the whole table would get: with the dense definition's
/// `table` in the layer's place.
fn two_lookups_and_a_head<H: Harness>(
    layer: &Layer<H>,
    world: &World,
    table: &TokenRows,
) -> Result<(PassGradients<H>, Exact), Failure> {
    let mut dense = Exact::zeros(world.v, world.d);
    let mut pass = Pass::default();
    let reversed: Vec<u32> = world.ids.iter().rev().copied().collect();
    for (ids, salt) in [(&world.ids, 1), (&reversed, 2)] {
        let upstream = noise(world.seed ^ salt, H::DTYPE, ids.len(), world.d);
        add_lookup(&mut dense, ids, &upstream, |_| 1.0);
        pass.lookups.push((layer.plan(ids)?, upstream));
    }
    let (hidden, upstream) = (world.hidden::<H>(), world.logits_upstream::<H>());
    let [_, of_table] = dense_gradients(&hidden, table, &upstream);
    add(&mut dense, &of_table);
    pass.heads.push(HeadPass::new(hidden, upstream));
    Ok((H::backward(layer, &pass)?, dense))
}

/// Each adapter's gradient is its part of the dense one, in one pass through lookups and head.
fn own_parts<H: Harness>(world: &World, members: &[Member], overlap: &Overlap) -> Outcome {
    if members.iter().all(|member| member.tokens.is_empty()) {
        return Ok(());
    }
    let layer = active::<H>(world, members, overlap)?;
    let table = in_effect(&world.table::<H>(), members, overlap)?;
    let (result, dense) = two_lookups_and_a_head::<H>(&layer, world, &table)?;
    for (member, want) in members.iter().zip(shares(members, overlap, &dense)) {
        let got = layer.adapter(member.name)?.gradient(&result.gradients)?;
        // It may come in the type of the adapter's own rows (SPEC.md G14).
        let within = tolerance(H::DTYPE).max(tolerance(got.dtype()));
        close_within(&format!("gradient of {:?}", member.name), &got, &want, within)?;
    }
    Ok(())
}

/// Each of several active adapters gets the gradient of its own rows, from lookups and head of one pass, zeros where its
/// tokens do not occur.
pub fn each_adapter_gets_its_own_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = disjoint(world, H::DTYPE.default_row_dtype());
        own_parts::<H>(world, &members, &Overlap::Refuse)
    })
}

/// A row that a later adapter's takes the place of gets a gradient of zero, and its adapter's other rows theirs.
pub fn shadowed_rows_get_a_zero_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        own_parts::<H>(world, &members, &Overlap::LastWins)
    })?;
    // All of the first adapter is shadowed: zeros, not nothing.
    let world = World::fixed(8, 3, &[6, 1, 3], &[6, 0, 3, 3]);
    let mut members = overlapping(&world, H::DTYPE.default_row_dtype());
    for member in &mut members {
        member.tokens.clone_from(&world.tokens);
        member.rows = noise(4, member.rows.dtype(), 3, 3);
    }
    let layer = active::<H>(&world, &members, &Overlap::LastWins)?;
    let table = in_effect(&world.table::<H>(), &members, &Overlap::LastWins)?;
    let (result, _) = two_lookups_and_a_head::<H>(&layer, &world, &table)?;
    let lookup = Pass {
        lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
        ..Pass::default()
    };
    for gradients in [result.gradients, H::backward(&layer, &lookup)?.gradients] {
        for member in &members[..2] {
            let got = layer.adapter(member.name)?.gradient(&gradients)?;
            ensure!(
                got.to_f64_vec().iter().all(|x| *x == 0.0),
                "the gradient of a shadowed adapter is {:?}",
                got.to_f64_vec()
            );
        }
    }
    Ok(())
}

/// Each row of a weighted mean gets the mean's gradient times its share.
pub fn weighted_rows_get_their_share_of_the_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let overlap = Overlap::WeightedMean(WEIGHTS.to_vec());
        own_parts::<H>(world, &overlapping(world, H::DTYPE.default_row_dtype()), &overlap)?;
        if !trains_in::<H>(DType::F64)? {
            return Ok(());
        }
        let mut members = overlapping(world, DType::F32);
        members[1].rows = members[1].rows.to_dtype(DType::F64);
        own_parts::<H>(world, &members, &overlap)
    })
}

/// The gradient of a head's hidden states is `upstream · W`, with the rows in effect in `W`.
pub fn hidden_states_get_the_gradient_of_the_rows_in_effect<H: Harness>() -> Outcome {
    for_all(|world| {
        let overlap = Overlap::WeightedMean(WEIGHTS.to_vec());
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        if members.iter().all(|member| member.tokens.is_empty()) {
            return Ok(());
        }
        let layer = active::<H>(world, &members, &overlap)?;
        let table = in_effect(&world.table::<H>(), &members, &overlap)?;
        let (result, _) = two_lookups_and_a_head::<H>(&layer, world, &table)?;
        let [want, _] = dense_gradients(&world.hidden::<H>(), &table, &world.logits_upstream::<H>());
        let got = result.hidden.first().ok_or("no gradient of the hidden states")?;
        close("gradient of the hidden states", got, &want, H::DTYPE)
    })
}

/// No gradient reaches an adapter that is inactive, or merged, and asking for it says so; the active ones get theirs.
pub fn inactive_and_merged_adapters_get_no_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = disjoint(world, H::DTYPE.default_row_dtype());
        let mut layer = active::<H>(world, &members, &Overlap::Refuse)?;
        layer.merge_adapters(&[members[0].name], &Overlap::Refuse, MergeCheck::default())?;
        layer.activate(&[members[0].name, members[1].name])?;
        if members[1].tokens.is_empty() {
            return Ok(());
        }
        let table = in_effect(&world.table::<H>(), &members[..2], &Overlap::Refuse)?;
        let (result, dense) = two_lookups_and_a_head::<H>(&layer, world, &table)?;
        let got = layer.adapter(members[1].name)?.gradient(&result.gradients)?;
        let want = &shares(&members, &Overlap::Refuse, &dense)[1];
        close("gradient of the active adapter", &got, want, H::DTYPE)?;
        for member in [&members[0], &members[2]] {
            if member.tokens.is_empty() {
                continue;
            }
            let got = layer.adapter(member.name)?.gradient(&result.gradients);
            let kind = got.err().map(|error| error.kind());
            equal(
                &format!("the error for {:?}", member.name),
                &kind,
                &Some(ErrorKind::NoGradient),
            )?;
        }
        Ok(())
    })
}

/// A step on the adapter of a name moves its rows and leaves those of the others, the table and which are active alone.
pub fn a_step_by_name_moves_one_adapter_only<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut members = disjoint(world, H::DTYPE.default_row_dtype());
        let mut layer = active::<H>(world, &members, &Overlap::Refuse)?;
        let table = in_effect(&world.table::<H>(), &members, &Overlap::Refuse)?;
        let Some(at) = members.iter().position(|member| !member.tokens.is_empty()) else {
            return Ok(());
        };
        let (result, dense) = two_lookups_and_a_head::<H>(&layer, world, &table)?;
        let config = SgdConfig {
            lr: 0.25,
            ..SgdConfig::default()
        };
        let mut sgd = Sgd::new(config)?;
        layer
            .adapter_mut(members[at].name)?
            .step(&result.gradients, &mut sgd, &mut [])?;
        let gradient = &shares(&members, &Overlap::Refuse, &dense)[at];
        let mut want = Exact::of(&members[at].rows);
        let pairs = want.values.iter_mut().zip(&gradient.values);
        pairs.for_each(|(w, g)| *w -= 0.25 * g);
        let moved = layer.adapter(members[at].name)?.rows()?;
        close("rows after the step", &moved, &want, H::DTYPE)?;
        members[at].rows = moved;
        for member in &members {
            let rows = layer.adapter(member.name)?.rows()?;
            same(&format!("rows of {:?}", member.name), &rows, &member.rows)?;
        }
        same("the table", &whole::<H>(&layer)?, &world.table::<H>())?;
        let dense = in_effect(&world.table::<H>(), &members, &Overlap::Refuse)?;
        let got = lookup::<H>(&layer, &world.ids)?;
        same("looked-up rows", &got, &select(&dense, &world.ids)?)?;
        // The layer's own step is about the one active adapter, of which there are three.
        let step = layer.step(&result.gradients, &mut sgd, &mut []);
        refused("a step without a name", step, ErrorKind::State)?;
        ensure!(layer.active_names().count() == 3, "other adapters are active");
        Ok(())
    })
}

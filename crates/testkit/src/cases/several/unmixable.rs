//! What a layer refuses while it is merged or disabled, and mixed batches and plans that do not fit.

use trainable_tokens_core::{ErrorKind, MergeCheck, Overlap, TokenRows, TokenSet};

use super::refused::{idle_but, refuses, three};
use super::team::idle;
use crate::failure::same;
use crate::world::lookup_mixed;
use crate::{Harness, Layer, Outcome};

/// While rows are merged, the layer is not disabled, and no adapter starts from the table; while it is disabled, nothing is
/// merged. Adapters with rows of their own are added all the same.
pub fn merged_rows_are_not_left_out_or_started_from<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let name = members[0].name;
    let mut layer = idle_but::<H>(&world, &members, &members[..1])?;
    let tokens = || TokenSet::new([4, 1], 7);
    layer.merge()?;
    let (kind, words) = (ErrorKind::State, [name, "unmerge"]);
    let disable = |layer: &mut Layer<H>| layer.disable();
    refuses::<H, _, _>(&mut layer, "disabling", kind, &words, disable)?;
    let set = tokens()?;
    let add = |layer: &mut Layer<H>| layer.add_adapter("new", set);
    refuses::<H, _, _>(&mut layer, "adding from merged rows", kind, &words, add)?;
    let merge = |layer: &mut Layer<H>| layer.merge();
    refuses::<H, _, _>(&mut layer, "merging again", kind, &words, merge)?;
    let rows = TokenRows::zeros(members[0].rows.dtype(), 2, 3);
    let write = |layer: &mut Layer<H>| layer.adapter_mut(name)?.set_rows(&rows);
    refuses::<H, _, _>(&mut layer, "rewriting", kind, &words, write)?;
    layer.add_adapter_with_rows("new", tokens()?, &rows)?;
    layer.unmerge()?;
    let unmerge = |layer: &mut Layer<H>| layer.unmerge();
    refuses::<H, _, _>(
        &mut layer,
        "unmerging again",
        kind,
        &["nothing is merged"],
        unmerge,
    )?;
    layer.disable()?;
    refuses::<H, _, _>(&mut layer, "merging while disabled", kind, &["enable"], merge)?;
    let by_name =
        |layer: &mut Layer<H>| layer.merge_adapters(&["new"], &Overlap::LastWins, MergeCheck::Finite);
    refuses::<H, _, _>(
        &mut layer,
        "merging by name while disabled",
        kind,
        &["enable"],
        by_name,
    )
}

/// A mixed batch is refused, in lookup and head, while rows are merged, whose ever they are, or adapters are disabled; so is
/// one that is not examples of equal length, or names an adapter that there is not.
pub fn mixed_batches_that_do_not_fit_are_refused<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let [first, third] = [members[0].name, members[2].name];
    let mut layer = idle::<H>(&world, &members)?;
    let hidden = |layer: &Layer<H>, rows| H::hidden(layer, &TokenRows::zeros(H::DTYPE, rows, 3));
    let plan = layer.plan_mixed(&[1, 2], &[Some(first), None])?;
    let both = |layer: &mut Layer<H>, kind, words: &[&str]| -> Outcome {
        let choices: [[Option<&str>; 2]; 2] = [[Some(first), None], [None, None]];
        for adapters in choices {
            let lookup = |layer: &mut Layer<H>| layer.lookup_mixed(&[1, 2], &adapters);
            refuses::<H, _, _>(layer, "a mixed lookup", kind, words, lookup)?;
            let head = |layer: &mut Layer<H>| layer.logits_mixed(hidden(layer, 2)?, &adapters);
            refuses::<H, _, _>(layer, "a mixed head", kind, words, head)?;
        }
        let lookup = |layer: &mut Layer<H>| layer.lookup_planned(&plan);
        refuses::<H, _, _>(layer, "a plan from before", kind, words, lookup)
    };
    layer.merge_adapters(&[third], &Overlap::Refuse, MergeCheck::Unchecked)?;
    both(&mut layer, ErrorKind::State, &[third, "unmerge"])?;
    layer.unmerge()?;
    layer.disable()?;
    both(&mut layer, ErrorKind::State, &["enable"])?;
    layer.enable();
    same(
        "rows",
        &H::read(&layer.lookup_planned(&plan)?)?,
        &lookup_mixed::<H>(&layer, &[1, 2], &[Some(first), None])?,
    )?;

    for (rows, examples) in [(3, 2), (2, 3), (1, 0), (7, 4)] {
        let (ids, adapters) = (vec![2; rows], vec![Some(first); examples]);
        let words = [rows.to_string(), examples.to_string()];
        let words = words.each_ref().map(String::as_str);
        let what = format!("{examples} examples of {rows} rows");
        let lookup = |layer: &mut Layer<H>| layer.lookup_mixed(&ids, &adapters);
        refuses::<H, _, _>(&mut layer, &what, ErrorKind::Shape, &words, lookup)?;
        let head = |layer: &mut Layer<H>| layer.logits_mixed(hidden(layer, rows)?, &adapters);
        refuses::<H, _, _>(&mut layer, &what, ErrorKind::Shape, &words, head)?;
    }
    let (kind, words) = (ErrorKind::Adapter, ["nobody", first]);
    let adapters = [None, Some("nobody")];
    let lookup = |layer: &mut Layer<H>| layer.lookup_mixed(&[1, 2], &adapters);
    refuses::<H, _, _>(&mut layer, "an unknown name", kind, &words, lookup)?;
    let head = |layer: &mut Layer<H>| layer.logits_mixed(hidden(layer, 2)?, &adapters);
    refuses::<H, _, _>(&mut layer, "an unknown name for a head", kind, &words, head)?;
    let (kind, adapters) = (ErrorKind::TokenOutOfRange, [Some(first), None]);
    let lookup = |layer: &mut Layer<H>| layer.lookup_mixed(&[6, 7], &adapters);
    refuses::<H, _, _>(&mut layer, "an id out of range", kind, &["7"], lookup)
}

/// A plan is refused once the rows in effect are of other tokens, or a mixed batch's adapter has other tokens or is gone.
pub fn plans_of_other_adapters_are_refused<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let [first, second, third] = [members[0].name, members[1].name, members[2].name];
    let mut layer = idle_but::<H>(&world, &members, &members[..1])?;
    let (kind, words) = (ErrorKind::TokenSet, ["another set"]);
    let own = layer.plan(&world.ids)?;
    let mixed = layer.plan_mixed(&[5, 2], &[Some(first), Some(second)])?;
    let stale = |layer: &mut Layer<H>| layer.lookup_planned(&own);
    for names in [&[][..], &[second], &[third, first], &[first, third]] {
        layer.activate(names)?;
        refuses::<H, _, _>(&mut layer, &format!("with {names:?} active"), kind, &words, stale)?;
    }
    // With the first one merged, the third alone is in effect; with both, what both stand for.
    layer.merge_adapters(&[first], &Overlap::Refuse, MergeCheck::Unchecked)?;
    refuses::<H, _, _>(&mut layer, "with its adapter merged", kind, &words, stale)?;
    layer.unmerge()?;
    layer.activate(&[first])?;
    layer.lookup_planned(&own)?;
    layer.lookup_planned(&mixed)?;

    let stale = |layer: &mut Layer<H>| layer.lookup_planned(&mixed);
    let rows = layer.delete_adapter(second)?.rows()?;
    let words = [second, first];
    refuses::<H, _, _>(
        &mut layer,
        "with an adapter gone",
        ErrorKind::Adapter,
        &words,
        stale,
    )?;
    for tokens in [[2, 0, 4], [0, 2, 3]] {
        layer.add_adapter_with_rows(second, TokenSet::new(tokens, 7)?, &rows)?;
        refuses::<H, _, _>(&mut layer, "with other tokens", kind, &["another set"], stale)?;
        layer.delete_adapter(second)?;
    }
    layer.add_adapter_with_rows(second, TokenSet::new([2, 0, 3], 7)?, &rows)?;
    let want = lookup_mixed::<H>(&layer, &[5, 2], &[Some(first), Some(second)])?;
    same("rows", &H::read(&layer.lookup_planned(&mixed)?)?, &want)
}

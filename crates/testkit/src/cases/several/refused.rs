//! What is refused, by which name, and that nothing changes then.

use trainable_tokens_core::{
    BackendError, ErrorKind, MergeCheck, Overlap, Sgd, SgdConfig, TokenAdapter, TokenRows, TokenSet,
};

use super::team::{Member, idle, names, overlapping};
use crate::failure::{equal, refused_naming, same};
use crate::world::{World, lookup, noise, whole};
use crate::{Failure, Harness, Layer, Outcome};

pub(super) const IDS: [u32; 7] = [0, 1, 2, 3, 4, 5, 6];

/// Three adapters of a table of seven rows: the first two share token 2, the third shares none.
pub(super) fn three<H: Harness>() -> (World, Vec<Member>) {
    let world = World::fixed(7, 3, &[5, 2], &IDS);
    let mut members = overlapping(&world, H::DTYPE.default_row_dtype());
    for (member, tokens) in members.iter_mut().zip([&[5, 2][..], &[2, 0, 3], &[6]]) {
        member.tokens = tokens.to_vec();
        member.rows = noise(9, member.rows.dtype(), tokens.len(), 3);
    }
    (world, members)
}

/// A layer with these adapters, some of them active.
pub(super) fn idle_but<H: Harness>(
    world: &World,
    members: &[Member],
    active: &[Member],
) -> Result<Layer<H>, Failure> {
    let mut layer = idle::<H>(world, members)?;
    layer.activate(&names(active))?;
    Ok(layer)
}

/// All that a call may change.
struct State {
    adapters: Vec<(String, bool, TokenRows)>,
    active: Vec<String>,
    overlap: Overlap,
    is_enabled: bool,
    merges: Vec<Vec<String>>,
    table: TokenRows,
    looked_up: TokenRows,
}

impl State {
    fn of<H: Harness>(layer: &Layer<H>) -> Result<Self, Failure> {
        let adapters = layer.adapters().map(|adapter| {
            let name = adapter.name().to_owned();
            Ok((name, adapter.is_merged(), adapter.rows()?))
        });
        let merges = layer.merges();
        Ok(Self {
            adapters: adapters.collect::<Result<_, Failure>>()?,
            active: layer.active_names().map(str::to_owned).collect(),
            overlap: layer.overlap().clone(),
            is_enabled: layer.is_enabled(),
            merges: merges.map(|names| names.map(str::to_owned).collect()).collect(),
            table: whole::<H>(layer)?,
            looked_up: lookup::<H>(layer, &IDS)?,
        })
    }
}

/// The call must be refused, with this kind of error and these words, and leave the layer as it was.
pub(super) fn refuses<H: Harness, T, E: BackendError>(
    layer: &mut Layer<H>,
    what: &str,
    kind: ErrorKind,
    words: &[&str],
    call: impl FnOnce(&mut Layer<H>) -> Result<T, E>,
) -> Outcome {
    let before = State::of::<H>(layer)?;
    let result = call(layer);
    refused_naming(what, result, kind, words)?;
    let after = State::of::<H>(layer)?;
    let what = |part: &str| format!("after {what}: {part}");
    equal(&what("adapters"), &after.adapters.len(), &before.adapters.len())?;
    for (after, before) in after.adapters.iter().zip(&before.adapters) {
        equal(
            &what("name and merged"),
            &(&after.0, after.1),
            &(&before.0, before.1),
        )?;
        same(&what("trained rows"), &after.2, &before.2)?;
    }
    equal(&what("active adapters"), &after.active, &before.active)?;
    equal(&what("overlap"), &after.overlap, &before.overlap)?;
    equal(&what("is_enabled"), &after.is_enabled, &before.is_enabled)?;
    equal(&what("merges"), &after.merges, &before.merges)?;
    same(&what("the table"), &after.table, &before.table)?;
    same(&what("looked-up rows"), &after.looked_up, &before.looked_up)
}

/// A name must be possible as a file's and a module's, and be unique; one that no adapter has, or that is given twice, is
/// refused by every call that takes names.
pub fn names_are_checked<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let mut layer = idle_but::<H>(&world, &members, &members[..1])?;
    let one = || TokenSet::new([4], 7);
    for name in ["", "a.b", "a/b", "a\\b", "a\nb", "a\0b", ".", members[0].name] {
        let (quoted, tokens) = (format!("{name:?}"), one()?);
        let (kind, words) = (ErrorKind::Adapter, [quoted.as_str()]);
        let add = |layer: &mut Layer<H>| layer.add_adapter(name, tokens);
        refuses::<H, _, _>(&mut layer, &format!("adding {name:?}"), kind, &words, add)?;
        let (rows, tokens) = (TokenRows::zeros(H::DTYPE.default_row_dtype(), 1, 3), one()?);
        let add = |layer: &mut Layer<H>| layer.add_adapter_with_rows(name, tokens, &rows);
        refuses::<H, _, _>(
            &mut layer,
            &format!("adding {name:?} with rows"),
            kind,
            &words,
            add,
        )?;
    }
    let (known, unknown) = (members[0].name, "nobody");
    let kind = ErrorKind::Adapter;
    let mut refuses =
        |what: &str, names: &[&str], call: &dyn Fn(&mut Layer<H>) -> Option<crate::Error<H>>| {
            refuses::<H, _, _>(&mut layer, what, kind, names, |layer| {
                call(layer).map_or(Ok(()), Err)
            })
        };
    refuses("activating", &[unknown, known], &|layer| {
        Some(layer.activate(&[known, unknown]).err()?.into())
    })?;
    refuses("activating twice", &[known], &|layer| {
        Some(layer.activate(&[known, known]).err()?.into())
    })?;
    refuses("deleting", &[unknown, known], &|layer| {
        Some(layer.delete_adapter(unknown).err()?.into())
    })?;
    refuses("reading", &[unknown, known], &|layer| {
        Some(layer.adapter(unknown).err()?.into())
    })?;
    refuses("rewriting", &[unknown, known], &|layer| {
        Some(layer.adapter_mut(unknown).err()?.into())
    })?;
    refuses("merging", &[unknown, known], &|layer| {
        layer
            .merge_adapters(&[known, unknown], &Overlap::LastWins, MergeCheck::Finite)
            .err()
    })?;
    refuses("merging twice", &[known], &|layer| {
        layer
            .merge_adapters(&[known, known], &Overlap::LastWins, MergeCheck::Finite)
            .err()
    })?;
    refuses("a mixed lookup", &[unknown, known], &|layer| {
        layer.lookup_mixed(&[1, 2], &[Some(known), Some(unknown)]).err()
    })
}

/// By default a token that two active adapters train is refused by its id and both names, so is one of a merged adapter.
pub fn a_token_of_two_active_adapters_is_refused<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let [first, second, third] = [members[0].name, members[1].name, members[2].name];
    let mut layer = idle_but::<H>(&world, &members, &members[2..])?;
    let (kind, words) = (ErrorKind::Overlap, ["token id 2", first, second]);
    for order in [[third, first, second], [second, third, first]] {
        let activate = |layer: &mut Layer<H>| layer.activate(&order);
        refuses::<H, _, _>(&mut layer, "activating", kind, &words, activate)?;
        let merge =
            |layer: &mut Layer<H>| layer.merge_adapters(&order, &Overlap::Refuse, MergeCheck::Unchecked);
        refuses::<H, _, _>(&mut layer, "merging", kind, &words, merge)?;
    }
    // Above or below rows in the table, and beside another active adapter, a choice is due too.
    let mean = Overlap::WeightedMean(vec![1.0]);
    layer.merge_adapters(&[first], &Overlap::Refuse, MergeCheck::Unchecked)?;
    for overlap in [&Overlap::Refuse, &mean] {
        let activate = |layer: &mut Layer<H>| layer.activate_overlapping(&[second], overlap.clone());
        refuses::<H, _, _>(&mut layer, "activating above", kind, &words, activate)?;
        let merge = |layer: &mut Layer<H>| layer.merge_adapters(&[second], overlap, MergeCheck::Unchecked);
        refuses::<H, _, _>(&mut layer, "merging above", kind, &words, merge)?;
    }
    layer.unmerge()?;
    layer.activate(&[first])?;
    for overlap in [&Overlap::Refuse, &mean] {
        let merge = |layer: &mut Layer<H>| layer.merge_adapters(&[second], overlap, MergeCheck::Unchecked);
        refuses::<H, _, _>(&mut layer, "merging below", kind, &words, merge)?;
    }
    Ok(())
}

/// Weights must be as many as the adapters, finite and above zero.
pub fn weights_are_checked<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let mut layer = idle_but::<H>(&world, &members, &members[..1])?;
    let two = names(&members[..2]);
    let wrong: [(&[f64], ErrorKind, &str); 7] = [
        (&[], ErrorKind::Shape, "weights"),
        (&[1.0], ErrorKind::Shape, "weights"),
        (&[1.0, 2.0, 3.0], ErrorKind::Shape, "weights"),
        (&[1.0, 0.0], ErrorKind::Hyperparameter, "weight"),
        (&[-1.0, 1.0], ErrorKind::Hyperparameter, "-1"),
        (&[1.0, f64::NAN], ErrorKind::Hyperparameter, "NaN"),
        (&[f64::INFINITY, 1.0], ErrorKind::Hyperparameter, "inf"),
    ];
    for (weights, kind, word) in wrong {
        let overlap = Overlap::WeightedMean(weights.to_vec());
        let what = format!("the weights {weights:?}");
        let activate = |layer: &mut Layer<H>| layer.activate_overlapping(&two, overlap.clone());
        refuses::<H, _, _>(&mut layer, &what, kind, &[word], activate)?;
        let merge = |layer: &mut Layer<H>| layer.merge_adapters(&two, &overlap, MergeCheck::Unchecked);
        refuses::<H, _, _>(&mut layer, &what, kind, &[word], merge)?;
    }
    Ok(())
}

/// An adapter that is active or merged is not deleted; any other is, and hands its rows over.
pub fn adapters_in_use_are_not_deleted<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let name = members[1].name;
    let mut layer = idle::<H>(&world, &members)?;
    let kind = ErrorKind::State;
    layer.activate(&[members[2].name, name])?;
    let delete = |layer: &mut Layer<H>| layer.delete_adapter(name);
    refuses::<H, _, _>(
        &mut layer,
        "deleting an active one",
        kind,
        &[name, "active"],
        delete,
    )?;
    layer.activate(&[members[2].name])?;
    layer.merge_adapters(&[name], &Overlap::Refuse, MergeCheck::Unchecked)?;
    refuses::<H, _, _>(
        &mut layer,
        "deleting a merged one",
        kind,
        &[name, "merged"],
        delete,
    )?;
    layer.unmerge()?;
    // One that stands before the active one.
    let before = lookup::<H>(&layer, &IDS)?;
    let (tokens, rows) = layer.delete_adapter(name)?.into_parts();
    equal("tokens handed over", &tokens.to_vec(), &members[1].tokens)?;
    same(
        "rows handed over",
        &trainable_tokens_core::DeltaStore::read(&rows)?,
        &members[1].rows,
    )?;
    same("rows", &lookup::<H>(&layer, &IDS)?, &before)?;
    let left: Vec<&str> = layer.adapters().map(TokenAdapter::name).collect();
    equal("adapters left", &left, &vec![members[0].name, members[2].name])?;
    layer.add_adapter(name, tokens)?;
    layer.activate(&[name])?;
    same(
        "rows with a new one of the name",
        &lookup::<H>(&layer, &IDS)?,
        &world.table::<H>(),
    )
}

/// What is about the one active adapter is refused if none or several are active, by their names; by name it works.
pub fn the_one_active_adapter_must_be_one<H: Harness>() -> Outcome {
    let (world, members) = three::<H>();
    let [first, third] = [members[0].name, members[2].name];
    let mut layer = idle::<H>(&world, &members)?;
    let rows = TokenRows::zeros(members[0].rows.dtype(), 2, 3);
    for (names, words) in [(&[][..], &["no adapter"][..]), (&[first, third], &[first, third])] {
        layer.activate(names)?;
        let kind = ErrorKind::State;
        let read = |layer: &mut Layer<H>| layer.rows();
        refuses::<H, _, _>(&mut layer, "reading", kind, words, read)?;
        let write = |layer: &mut Layer<H>| layer.set_rows(&rows);
        refuses::<H, _, _>(&mut layer, "rewriting", kind, words, write)?;
        let leaf = |layer: &mut Layer<H>| layer.delta().map(|_| ());
        refuses::<H, _, _>(&mut layer, "the leaf", kind, words, leaf)?;
        let mut sgd = Sgd::new(SgdConfig::default())?;
        let step = |layer: &mut Layer<H>| layer.step_with(rows.clone(), &mut sgd, &mut []);
        refuses::<H, _, _>(&mut layer, "stepping", kind, words, step)?;
    }
    let merge = |layer: &mut Layer<H>| layer.merge();
    layer.activate(&[])?;
    refuses::<H, _, _>(
        &mut layer,
        "merging none",
        ErrorKind::State,
        &["no adapter"],
        merge,
    )?;
    let adapter = layer.adapter_mut(first)?;
    adapter.step_with(rows.clone(), &mut Sgd::new(SgdConfig::default())?, &mut [])?;
    same("rows after a step of zero", &adapter.rows()?, &members[0].rows)?;
    adapter.set_rows(&rows)?;
    same("rewritten rows", &layer.adapter(first)?.rows()?, &rows)
}

//! Any sequence of calls, against a model that knows tables and rows and nothing else.

mod call;
mod model;

use trainable_tokens_core::{BackendError, TokenAdapter, TokenRows};

use self::call::calls;
use self::model::Model;
use crate::failure::{ensure, equal, same};
use crate::world::{World, for_each_of, lookup, select, whole, world};
use crate::{Harness, Layer, Outcome};

/// After any sequence of calls (adding, activating, switching, disabling, merging, unmerging, deleting, rewriting, stepping)
/// the lookup and the table have the bits of the dense definition, and refused calls, of the kind that it predicts, change
/// nothing; undoing every merge restores the table's bits.
pub fn any_sequence_of_calls_agrees_with_the_dense_model<H: Harness>() -> Outcome {
    for_each_of((calls(), world()), |(calls, world)| {
        let table = world.table::<H>();
        let mut layer = Layer::<H>::frozen(H::source(&table)?)?;
        let mut model = Model::new(table.clone());
        for (at, call) in calls.iter().enumerate() {
            let what = format!("after call {} of {}, {call:?}", at + 1, calls.len());
            let expected = model.refusals(call);
            match call.make::<H>(&mut layer) {
                Ok(looked_up) => {
                    ensure!(
                        expected.is_empty(),
                        "{what}: accepted, expected one of {expected:?}"
                    );
                    let want = model.accept(call)?;
                    if let (Some(got), Some(want)) = (looked_up, want) {
                        same(&format!("{what}: rows of the mixed batch"), &got, &want)?;
                    }
                }
                Err(error) => {
                    let kind = error.kind();
                    ensure!(
                        expected.contains(&kind),
                        "{what}: refused as {kind:?} ({error}), expected one of {expected:?}"
                    );
                }
            }
            agrees::<H>(&what, &layer, &model, world)?;
        }
        while layer.is_merged() {
            layer.unmerge()?;
            model.unmerge();
            agrees::<H>("while all is unmerged", &layer, &model, world)?;
        }
        same("the table at last", &whole::<H>(&layer)?, &table)
    })
}

/// Whether the layer is in the model's state, and its outputs are the model's.
fn agrees<H: Harness>(what: &str, layer: &Layer<H>, model: &Model, world: &World) -> Outcome {
    let what = |part: &str| format!("{what}: {part}");
    let active: Vec<&str> = layer.active_names().collect();
    equal(&what("active adapters"), &active, &model.active)?;
    equal(&what("overlap"), layer.overlap(), &model.overlap)?;
    equal(&what("is_enabled"), &layer.is_enabled(), &model.enabled)?;
    let merges: Vec<Vec<&str>> = layer.merges().map(Iterator::collect).collect();
    let want: Vec<_> = model.merges.iter().map(|(names, _)| names.clone()).collect();
    equal(&what("merges"), &merges, &want)?;
    let names: Vec<&str> = layer.adapters().map(TokenAdapter::name).collect();
    let want: Vec<&str> = model.adapters.iter().map(|member| member.name).collect();
    equal(&what("adapters"), &names, &want)?;
    for (adapter, member) in layer.adapters().zip(&model.adapters) {
        same(&what("trained rows"), &adapter.rows()?, &member.rows)?;
        equal(
            &what("is_merged"),
            &adapter.is_merged(),
            &model.is_merged(member.name),
        )?;
    }
    same(&what("the table"), &whole::<H>(layer)?, &model.table)?;
    let all: Vec<u32> = world.ids.iter().copied().chain((0u32..).take(world.v)).collect();
    let want: TokenRows = select(&model.dense()?, &all)?;
    same(&what("looked-up rows"), &lookup::<H>(layer, &all)?, &want)
}

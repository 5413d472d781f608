//! What is refused, and as what.

use trainable_tokens_core::{
    ErrorKind, LayerOptions, LookupPlan, Padding, PaddingRule, TokenId, TokenRows, TokenSet,
};

use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, lookup, noise, select, whole};
use crate::{Failure, Harness, Layer, Outcome};

/// An id outside the vocabulary is refused by name before anything is read, wherever it stands in the batch.
pub fn ids_out_of_range_are_refused<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let beyond = u32::try_from(world.v)?;
        for id in [beyond, beyond + 1, u32::MAX] {
            for at in [0, world.ids.len() / 2, world.ids.len()] {
                let mut ids = world.ids.clone();
                ids.insert(at, id);
                refused("the id", layer.lookup(&ids), ErrorKind::TokenOutOfRange)?;
                let Err(error) = layer.lookup(&ids) else {
                    return Err(Failure::new("the id is accepted"));
                };
                let text = error.to_string();
                if !text.contains(&id.to_string()) {
                    return Err(Failure::new(format!(
                        "the error does not name the id {id}: {text}"
                    )));
                }
            }
        }
        let want = select(&world.dense::<H>()?, &world.ids)?;
        same(
            "rows after refused lookups",
            &lookup::<H>(&layer, &world.ids)?,
            &want,
        )
    })
}

/// A token set of another vocabulary is refused.
pub fn a_token_set_of_another_vocabulary_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    for v in [6, 8] {
        let source = H::source(&world.table::<H>())?;
        let tokens = TokenSet::new([5, 2], v)?;
        refused("the token set", Layer::<H>::new(source, tokens), ErrorKind::Shape)?;
    }
    Ok(())
}

/// A plan of another token set is refused.
pub fn a_plan_of_another_token_set_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let layer = world.trained::<H>()?;
    // Of other sizes, and of the same sizes in another order or with another token.
    for tokens in [&[5][..], &[5, 2, 1], &[2, 5], &[5, 1]] {
        let other = TokenSet::new(tokens.iter().copied(), 7)?;
        let plan = LookupPlan::new(&other, LayerOptions::default(), &[5, 1])?;
        refused("the plan", layer.lookup_planned(&plan), ErrorKind::TokenSet)?;
    }
    Ok(())
}

/// Hidden states of another width are refused, by the head with untrained and with trained rows.
pub fn hidden_states_of_another_width_are_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    for layer in [world.fresh::<H>()?, world.trained::<H>()?] {
        for width in [2, 4] {
            let hidden = noise(1, H::DTYPE, 2, width);
            // A framework whose values have their sizes in their types may refuse to make them.
            match H::hidden(&layer, &hidden) {
                Ok(hidden) => refused("the hidden states", layer.logits(hidden), ErrorKind::Shape)?,
                Err(error) => refused("the hidden states", Err::<(), _>(error), ErrorKind::Shape)?,
            }
        }
    }
    Ok(())
}

/// A padding token outside the vocabulary is refused with the first batch.
pub fn padding_outside_the_vocabulary_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[5]);
    let options = LayerOptions {
        padding: Some(Padding {
            token: TokenId(7),
            rule: PaddingRule::NoLookupGradient,
        }),
        ..LayerOptions::default()
    };
    let layer = world.trained::<H>()?.with_options(options);
    refused(
        "the padding",
        layer.lookup(&world.ids),
        ErrorKind::TokenOutOfRange,
    )
}

/// What is refused leaves rows, table and state as they were.
pub fn refusals_change_nothing<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[5, 0]);
    let mut layer = world.trained::<H>()?;
    refused("an id", layer.lookup(&[0, 7]), ErrorKind::TokenOutOfRange)?;
    refused(
        "rows",
        layer.set_rows(&TokenRows::zeros(H::DTYPE, 3, 3)),
        ErrorKind::Shape,
    )?;
    refused("unmerging", layer.unmerge(), ErrorKind::State)?;
    same("rows", &layer.rows()?, &world.rows::<H>())?;
    same("the table", &whole::<H>(&layer)?, &world.table::<H>())?;
    equal("is_merged", &layer.is_merged(), &false)
}

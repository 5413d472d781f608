//! What is refused, and as what.

use trainable_tokens_core::{
    BackendError, Error, ErrorKind, LayerOptions, LookupPlan, Padding, PaddingRule, TokenId, TokenRows,
    TokenSet,
};

use crate::failure::{ensure, equal, refused, same};
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

/// Ids of a token set are checked in order: the first that is out of range or was there before is named, with the
/// slots.
pub fn a_token_set_names_the_first_culprit<H: Harness>() -> Outcome {
    for_all(|world| {
        let beyond = [u32::try_from(world.v)?, u32::MAX];
        let mut lists = vec![world.tokens.clone(), world.ids.clone()];
        for at in [0, world.ids.len() / 2, world.ids.len()] {
            for id in beyond {
                let mut ids = world.ids.clone();
                ids.insert(at, id);
                ids.push(id);
                lists.push(ids);
            }
        }
        for ids in lists {
            let want = first_culprit(&ids, world.v);
            let got = TokenSet::new(ids.iter().copied(), world.v).err();
            equal(&format!("the error for {ids:?} of {}", world.v), &got, &want)?;
            let text = got.map(|error| error.to_string()).unwrap_or_default();
            let named = match want {
                Some(Error::TokenOutOfRange { id, vocab_size }) => [id.to_string(), vocab_size.to_string()],
                Some(Error::DuplicateToken { id, first, second }) => {
                    [id.to_string(), format!("{first} and {second}")]
                }
                _ => Default::default(),
            };
            ensure!(
                named.iter().all(|part| text.contains(part)),
                "{named:?} is not in: {text}"
            );
        }
        Ok(())
    })
}

fn first_culprit(ids: &[u32], vocab_size: usize) -> Option<Error> {
    ids.iter().enumerate().find_map(|(second, id)| {
        if *id as usize >= vocab_size {
            let id = i64::from(*id);
            return Some(Error::TokenOutOfRange { id, vocab_size });
        }
        let first = ids[..second].iter().position(|other| other == id)?;
        let id = TokenId(*id);
        Some(Error::DuplicateToken { id, first, second })
    })
}

/// A vocabulary that ids of 32 bits cannot name is refused, whatever the ids.
pub fn a_vocabulary_beyond_32_bits_is_refused<H: Harness>() -> Outcome {
    // Where sizes have 32 bits themselves, there is no such vocabulary.
    let Ok(vocab_size) = usize::try_from(1u64 << 32) else {
        return Ok(());
    };
    for ids in [&[][..], &[0], &[3, 3], &[u32::MAX]] {
        let error = TokenSet::new(ids.iter().copied(), vocab_size).err();
        equal(
            "the error",
            &error,
            &Some(Error::VocabularyTooLarge { vocab_size }),
        )?;
        equal(
            "its kind",
            &error.map(|error| error.kind()),
            &Some(ErrorKind::TokenOutOfRange),
        )?;
    }
    Ok(())
}

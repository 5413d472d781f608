//! The gradients of batches whose examples choose their adapters.

use trainable_tokens_core::{
    BackendError, EmbedScale, ErrorKind, LayerOptions, Overlap, Padding, PaddingRule, TokenId,
};

use super::mixed::{by_name, choose, seen};
use super::team::{Member, add, add_lookup, idle, overlapping, shares};
use crate::cases::head::dense_gradients;
use crate::failure::{Exact, close, equal};
use crate::world::{World, for_all, noise, select};
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass};

const EXAMPLES: usize = 4;

/// A lookup and a head of a mixed batch, and what the whole table of each adapter, as it alone sees it, would get as its
/// gradient; `weight` by example, position in it and the example's ids.
struct MixedPass {
    pass: Pass,
    dense: Vec<Exact>,
    /// Of the head's hidden states.
    hidden: Exact,
}

fn mixed_pass<H: Harness>(
    layer: &Layer<H>,
    world: &World,
    members: &[Member],
    choice: &[Option<usize>],
    weight: impl Fn(Option<usize>, u32) -> f64,
) -> Result<MixedPass, Failure> {
    let length = world.ids.len() / choice.len();
    let ids = &world.ids[..choice.len() * length];
    let names = by_name(members, choice);
    let upstream = noise(world.seed ^ 0x1234, H::DTYPE, ids.len(), world.d);
    let mut dense = vec![Exact::zeros(world.v, world.d); members.len()];
    for (at, dense) in dense.iter_mut().enumerate() {
        // Other examples' positions count nothing for this adapter.
        let own = |position: usize| choice[position / length.max(1)] == Some(at);
        let weight = |position| {
            if own(position) {
                weight(Some(at), ids[position])
            } else {
                0.0
            }
        };
        add_lookup(dense, ids, &upstream, weight);
    }
    let mut pass = Pass {
        lookups: vec![(layer.plan_mixed(ids, &names)?, upstream)],
        ..Pass::default()
    };
    let rows = 2 * choice.len();
    let hidden = noise(world.seed ^ 0x77, H::DTYPE, rows, world.d);
    let upstream = noise(world.seed ^ 0x99, H::DTYPE, rows, world.v);
    let mut of_hidden = Exact::zeros(rows, world.d);
    for (example, choice) in choice.iter().enumerate() {
        let own: Vec<u32> = (0u32..).skip(2 * example).take(2).collect();
        let [hidden, upstream] = [select(&hidden, &own)?, select(&upstream, &own)?];
        let table = seen(&world.table::<H>(), members, *choice)?;
        let [part, of_table] = dense_gradients(&hidden, &table, &upstream);
        of_hidden.values[2 * example * world.d..][..2 * world.d].copy_from_slice(&part.values);
        if let Some(at) = choice {
            add(&mut dense[*at], &of_table);
        }
    }
    let names = names.into_iter().map(|name| name.map(str::to_owned));
    pass.heads.push(HeadPass {
        adapters: Some(names.collect()),
        ..HeadPass::new(hidden, upstream)
    });
    Ok(MixedPass {
        pass,
        dense,
        hidden: of_hidden,
    })
}

/// Each adapter gets the gradient of the examples that chose it, from lookup and head of one pass, and no other adapter
/// gets any; padding, scale and frequency count as in a run of its own.
pub fn mixed_examples_train_their_own_adapters<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let (choice, length) = choose(world, &members, EXAMPLES);
        let padding = world.ids[0];
        let no_padding = LayerOptions {
            padding: Some(Padding {
                token: TokenId(padding),
                rule: PaddingRule::NoLookupGradient,
            }),
            ..LayerOptions::default()
        };
        let all = LayerOptions {
            scale: Some(EmbedScale::Exact(0.5)),
            scale_grad_by_freq: true,
            ..no_padding
        };
        // How often an id occurs among the examples of an adapter.
        let count = |chosen, id| {
            let ids = world.ids[..EXAMPLES * length].iter().enumerate();
            let own = ids.filter(|(at, other)| choice[at / length] == chosen && **other == id);
            own.count() as f64
        };
        for options in [LayerOptions::default(), no_padding, all] {
            let weight = |chosen, id| match options.padding {
                Some(_) if id == padding => 0.0,
                _ if options.scale_grad_by_freq => 0.5 / count(chosen, id),
                _ => 1.0,
            };
            let layer = idle::<H>(world, &members)?.with_options(options);
            let MixedPass { pass, dense, .. } = mixed_pass::<H>(&layer, world, &members, &choice, weight)?;
            let used = |at| choice.contains(&Some(at));
            if !(0..3).any(|at| used(at) && !members[at].tokens.is_empty()) {
                return Ok(());
            }
            let gradients = H::backward(&layer, &pass)?.gradients;
            for (at, member) in members
                .iter()
                .enumerate()
                .filter(|(_, member)| !member.tokens.is_empty())
            {
                let got = layer.adapter(member.name)?.gradient(&gradients);
                if used(at) {
                    let want = &shares(std::slice::from_ref(member), &Overlap::Refuse, &dense[at])[0];
                    close(&format!("gradient of {:?}", member.name), &got?, want, H::DTYPE)?;
                } else {
                    let kind = got.err().map(|error| error.kind());
                    let what = format!("the error for {:?}, which no example chose", member.name);
                    equal(&what, &kind, &Some(ErrorKind::NoGradient))?;
                }
            }
        }
        Ok(())
    })
}

/// An adapter that an example chose gets zeros, not nothing, if none of its tokens is in the batch.
pub fn chosen_adapters_without_a_token_in_the_batch_get_zeros<H: Harness>() -> Outcome {
    let world = World::fixed(8, 3, &[6, 1, 3], &[]);
    let mut members = overlapping(&world, H::DTYPE.default_row_dtype());
    for (member, tokens) in members.iter_mut().zip([&[6, 1][..], &[6], &[3, 4]]) {
        member.tokens = tokens.to_vec();
        member.rows = noise(4, member.rows.dtype(), tokens.len(), 3);
    }
    let layer = idle::<H>(&world, &members)?;
    // The first adapter's examples hold none of its tokens; 6 stands in those of others.
    let names = [Some(members[0].name), Some(members[1].name), None];
    for ids in [[0, 2, 6, 6, 1, 3], [0, 2, 5, 5, 1, 6]] {
        let pass = Pass {
            lookups: vec![(layer.plan_mixed(&ids, &names)?, noise(5, H::DTYPE, 6, 3))],
            ..Pass::default()
        };
        let gradients = H::backward(&layer, &pass)?.gradients;
        let got = layer.adapter(members[0].name)?.gradient(&gradients)?;
        equal("the gradient", &got.to_f64_vec(), &vec![0.0; 6])?;
        let got = layer.adapter(members[1].name)?.gradient(&gradients)?;
        let hit = got.to_f64_vec().iter().any(|x| *x != 0.0);
        equal(
            "whether the second one has a gradient",
            &hit,
            &ids.starts_with(&[0, 2, 6]),
        )?;
    }
    Ok(())
}

/// The gradient of a mixed head's hidden states is `upstream · W`, with the rows in `W` that the example chose.
pub fn hidden_states_get_the_gradient_of_their_examples_rows<H: Harness>() -> Outcome {
    for_all(|world| {
        let members = overlapping(world, H::DTYPE.default_row_dtype());
        let (choice, _) = choose(world, &members, EXAMPLES);
        let layer = idle::<H>(world, &members)?;
        if !choice.iter().flatten().any(|at| !members[*at].tokens.is_empty()) {
            return Ok(());
        }
        let MixedPass { pass, hidden, .. } = mixed_pass::<H>(&layer, world, &members, &choice, |_, _| 1.0)?;
        let result = H::backward(&layer, &pass)?;
        let got = result.hidden.first().ok_or("no gradient of the hidden states")?;
        close("gradient of the hidden states", got, &hidden, H::DTYPE)
    })
}

//! The gradient of the trained rows from lookups.

use trainable_tokens_core::{
    BackendError, EmbedScale, ErrorKind, LayerOptions, MaxNorm, Padding, PaddingRule, TokenId, TokenRows,
};

use crate::failure::{Exact, close, ensure, equal};
use crate::world::{World, for_all, noise};
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass};

/// The rows' gradient of one lookup of the world's batch.
fn gradient<H: Harness>(layer: &Layer<H>, world: &World) -> Result<TokenRows, Failure> {
    let pass = Pass {
        lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
        ..Pass::default()
    };
    Ok(layer.gradient(&H::backward(layer, &pass)?.gradients)?)
}

/// The dense gradient of the table, of which the chosen rows are asked; `weight` by id.
fn dense<H: Harness>(world: &World, weight: impl Fn(u32) -> f64) -> Exact {
    let mut sums = Exact::zeros(world.v, world.d);
    let upstream = Exact::of(&world.upstream::<H>());
    for (at, id) in world.ids.iter().enumerate() {
        let weight = weight(*id);
        let to = sums.row_mut(*id as usize).iter_mut();
        to.zip(upstream.row(at)).for_each(|(sum, x)| *sum += weight * x);
    }
    sums
}

/// The gradient has one row per slot, in slot order: the sum over the positions of its token.
pub fn repeats_are_summed_by_slot<H: Harness>() -> Outcome {
    for_all(|world| weighted_by::<H>(world, LayerOptions::default(), |_| 1.0))
}

/// Slots whose token does not occur get zeros, not nothing.
pub fn absent_tokens_get_zero<H: Harness>() -> Outcome {
    let world = World::fixed(8, 3, &[6, 1, 3], &[0, 3, 3, 5]);
    let got = Exact::of(&gradient::<H>(&world.trained::<H>()?, &world)?);
    for slot in [0, 1] {
        ensure!(
            got.row(slot).iter().all(|x| *x == 0.0),
            "slot {slot} is absent, its gradient {:?}",
            got.row(slot)
        );
    }
    ensure!(
        got.row(2).iter().any(|x| *x != 0.0),
        "the slot that occurs has no gradient"
    );
    Ok(())
}

/// A batch without any trainable token gives zeros, and no panic.
pub fn a_batch_without_trainable_tokens_gives_zeros<H: Harness>() -> Outcome {
    let world = World::fixed(8, 3, &[6, 1], &[0, 3, 3, 5]);
    for layer in [world.fresh::<H>()?, world.trained::<H>()?] {
        let got = gradient::<H>(&layer, &world)?;
        equal("shape", &got.shape(), &[2, 3])?;
        ensure!(
            got.to_f64_vec().iter().all(|x| *x == 0.0),
            "gradient {:?}",
            got.to_f64_vec()
        );
    }
    Ok(())
}

/// With no trainable token at all the gradient has no row.
pub fn no_token_has_no_gradient_row<H: Harness>() -> Outcome {
    let world = World::fixed(8, 3, &[], &[0, 3]);
    let layer = world.fresh::<H>()?;
    // No backward pass: nothing of the graph depends on a leaf. Any gradients will do.
    let other = World::fixed(8, 3, &[0], &[0, 3]);
    let trained = other.trained::<H>()?;
    let pass = Pass {
        lookups: vec![(trained.plan(&other.ids)?, other.upstream::<H>())],
        ..Pass::default()
    };
    let gradients = H::backward(&trained, &pass)?.gradients;
    equal("shape", &layer.gradient(&gradients)?.shape(), &[0, 3])
}

/// Two lookups of one pass add their gradients up.
pub fn lookups_of_one_pass_add_up<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let mut second = world.clone();
        second.seed ^= 0xabc;
        second.ids.reverse();
        let lookups = [world, &second].map(|world| Ok((layer.plan(&world.ids)?, world.upstream::<H>())));
        let pass = Pass {
            lookups: lookups.into_iter().collect::<Result<_, Failure>>()?,
            ..Pass::default()
        };
        if world.tokens.is_empty() {
            return Ok(());
        }
        let got = layer.gradient(&H::backward(&layer, &pass)?.gradients)?;
        let mut want = dense::<H>(world, |_| 1.0);
        let more = dense::<H>(&second, |_| 1.0);
        want.values
            .iter_mut()
            .zip(more.values)
            .for_each(|(sum, x)| *sum += x);
        close("gradient", &got, &world.chosen(&want), H::DTYPE)
    })
}

/// Sums of many repeats keep the precision of the compute type: half types would stop counting at 256 or 2048.
pub fn repeats_are_summed_in_the_compute_type<H: Harness>() -> Outcome {
    let ids = vec![2u32; 3000];
    let world = World::fixed(4, 2, &[2], &ids);
    let layer = world.trained::<H>()?;
    let ones = TokenRows::new(vec![1f64; ids.len() * 2], ids.len(), 2)?.to_dtype(H::DTYPE);
    let pass = Pass {
        lookups: vec![(layer.plan(&ids)?, ones)],
        ..Pass::default()
    };
    let got = layer.gradient(&H::backward(&layer, &pass)?.gradients)?;
    equal("gradient", &got.to_f64_vec(), &vec![3000.0; 2])
}

fn with_padding(world: &World, rule: PaddingRule) -> LayerOptions {
    LayerOptions {
        padding: Some(Padding {
            token: TokenId(world.ids[0]),
            rule,
        }),
        ..LayerOptions::default()
    }
}

/// Under torch's rule the padding token gets no gradient from the lookup, though its row is used.
pub fn the_padding_token_gets_no_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let layer = layer.with_options(with_padding(world, PaddingRule::NoLookupGradient));
        let want = dense::<H>(world, |id| if id == world.ids[0] { 0.0 } else { 1.0 });
        close(
            "gradient",
            &gradient_or_none::<H>(&layer, world)?,
            &world.chosen(&want),
            H::DTYPE,
        )?;
        let rows = crate::world::lookup::<H>(&layer, &world.ids)?;
        let want = crate::world::select(&world.dense::<H>()?, &world.ids)?;
        crate::failure::same("rows", &rows, &want)
    })
}

/// If that is asked for, the padding token trains like any other.
pub fn the_padding_token_trains_if_asked<H: Harness>() -> Outcome {
    for_all(|world| {
        let options = with_padding(world, PaddingRule::Train);
        weighted_by::<H>(world, options, |_| 1.0)
    })
}

/// [`gradient`], for worlds that may have no trainable token: there is nothing to run backward then.
fn gradient_or_none<H: Harness>(layer: &Layer<H>, world: &World) -> Result<TokenRows, Failure> {
    if world.tokens.is_empty() {
        return Ok(TokenRows::zeros(H::DTYPE.default_row_dtype(), 0, world.d));
    }
    gradient::<H>(layer, world)
}

/// With these options the gradient of the rows is the dense one, each position weighted by its id.
fn weighted_by<H: Harness>(world: &World, options: LayerOptions, weight: impl Fn(u32) -> f64) -> Outcome {
    let layer = world.trained::<H>()?.with_options(options);
    let want = world.chosen(&dense::<H>(world, weight));
    close(
        "gradient",
        &gradient_or_none::<H>(&layer, world)?,
        &want,
        H::DTYPE,
    )
}

/// The embedding's factor multiplies the gradient, too.
pub fn a_scale_multiplies_the_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let scale = EmbedScale::TableDType(2.5);
        let options = LayerOptions {
            scale: Some(scale),
            ..LayerOptions::default()
        };
        weighted_by::<H>(world, options, |_| 2.5)
    })
}

/// Under `scale_grad_by_freq` a gradient is divided by how often its id occurs in the batch.
pub fn frequent_ids_count_less_if_asked<H: Harness>() -> Outcome {
    for_all(|world| {
        let options = LayerOptions {
            scale_grad_by_freq: true,
            ..LayerOptions::default()
        };
        let count = |id| world.ids.iter().filter(|other| **other == id).count();
        weighted_by::<H>(world, options, |id| 1.0 / count(id) as f64)
    })
}

/// `max_norm` counts as the identity.
pub fn max_norm_leaves_the_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        let options = LayerOptions {
            max_norm: Some(MaxNorm::new(0.5)?),
            ..LayerOptions::default()
        };
        weighted_by::<H>(world, options, |_| 1.0)
    })
}

/// All options at once.
pub fn options_combine<H: Harness>() -> Outcome {
    for_all(|world| {
        let options = LayerOptions {
            scale: Some(EmbedScale::Exact(0.5)),
            scale_grad_by_freq: true,
            max_norm: Some(MaxNorm::new(0.5)?),
            ..with_padding(world, PaddingRule::NoLookupGradient)
        };
        let count = |id| world.ids.iter().filter(|other| **other == id).count();
        let weight = |id| {
            if id == world.ids[0] {
                0.0
            } else {
                0.5 / count(id) as f64
            }
        };
        weighted_by::<H>(world, options, weight)
    })
}

/// While the rows are merged no gradient reaches them, and the layer says so.
pub fn merged_rows_get_no_gradient<H: Harness>() -> Outcome {
    let world = World::fixed(8, 3, &[6, 1], &[6, 1, 0]);
    let mut layer = world.trained::<H>()?;
    layer.merge()?;
    // A head whose hidden states get a gradient keeps the pass alive in frameworks that refuse an empty one.
    let pass = Pass {
        lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
        heads: vec![HeadPass::new(noise(1, H::DTYPE, 2, 3), noise(2, H::DTYPE, 2, 8))],
        ..Pass::default()
    };
    let error = match H::backward(&layer, &pass) {
        Err(error) => error,
        Ok(gradients) => match layer.gradient(&gradients.gradients) {
            Err(error) => error,
            Ok(_) => return Err(Failure::new("a merged layer has a gradient")),
        },
    };
    equal("kind of error", &error.kind(), &ErrorKind::NoGradient)
}

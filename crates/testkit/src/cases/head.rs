//! The head that shares the table.

use trainable_tokens_core::{
    EmbedScale, LayerOptions, Padding, PaddingRule, Sgd, SgdConfig, TokenId, TokenRows, TokenSet,
};

use crate::failure::{Exact, close, ensure, same};
use crate::world::{World, for_all, logits, lookup, noise, overwritten, select, whole};
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass};

/// `a · bᵀ` in `f64`.
pub(super) fn product(a: &TokenRows, b: &TokenRows) -> Exact {
    let (a, b) = (Exact::of(a), Exact::of(b));
    let mut out = Exact::zeros(a.shape[0], b.shape[0]);
    for i in 0..a.shape[0] {
        for j in 0..b.shape[0] {
            out.row_mut(i)[j] = a.row(i).iter().zip(b.row(j)).map(|(x, y)| x * y).sum();
        }
    }
    out
}

/// `upstream · table` and `upstreamᵀ · hidden` in `f64`: the gradients of the hidden states and of the whole table.
pub(super) fn dense_gradients(hidden: &TokenRows, table: &TokenRows, upstream: &TokenRows) -> [Exact; 2] {
    let [hidden, table, upstream] = [hidden, table, upstream].map(Exact::of);
    let mut of_hidden = Exact::zeros(hidden.shape[0], hidden.shape[1]);
    let mut of_table = Exact::zeros(table.shape[0], table.shape[1]);
    for n in 0..upstream.shape[0] {
        for v in 0..upstream.shape[1] {
            let weight = upstream.row(n)[v];
            for d in 0..hidden.shape[1] {
                of_hidden.row_mut(n)[d] += weight * table.row(v)[d];
                of_table.row_mut(v)[d] += weight * hidden.row(n)[d];
            }
        }
    }
    [of_hidden, of_table]
}

/// One backward pass through the head: the gradients of the hidden states and of the rows.
fn backward<H: Harness>(layer: &Layer<H>, world: &World) -> Result<[TokenRows; 2], Failure> {
    let pass = Pass {
        heads: vec![HeadPass::new(world.hidden::<H>(), world.logits_upstream::<H>())],
        ..Pass::default()
    };
    let mut result = H::backward(layer, &pass)?;
    let rows = layer.gradient(&result.gradients)?;
    let hidden = result.hidden.pop();
    Ok([
        hidden.ok_or("the harness returned no gradient of the hidden states")?,
        rows,
    ])
}

/// A new layer's logits are those of the frozen head, bit for bit.
pub fn untrained_rows_are_a_no_op<H: Harness>() -> Outcome {
    for_all(|world| {
        let frozen = Layer::<H>::new(H::source(&world.table::<H>())?, TokenSet::new([], world.v)?)?;
        let hidden = world.hidden::<H>();
        let want = logits::<H>(&frozen, &hidden)?;
        same("logits", &logits::<H>(&world.fresh::<H>()?, &hidden)?, &want)
    })
}

/// The logits are `hidden · Wᵀ` for the table with the trained rows written into it.
pub fn trained_columns_replace_the_bases<H: Harness>() -> Outcome {
    for_all(|world| {
        let (layer, hidden) = (world.trained::<H>()?, world.hidden::<H>());
        let want = product(&hidden, &world.dense::<H>()?);
        close("logits", &logits::<H>(&layer, &hidden)?, &want, H::DTYPE)
    })
}

/// Columns of frozen rows, and of trainable rows that still equal the base's, keep the frozen head's bits.
pub fn other_columns_keep_their_bits<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = world.table::<H>();
        let frozen = Layer::<H>::new(H::source(&table)?, TokenSet::new([], world.v)?)?;
        // Every second trainable row moves.
        let (moved, kept): (Vec<_>, Vec<_>) =
            (0u32..).zip(&world.tokens).partition(|(slot, _)| slot % 2 == 0);
        let moved: Vec<u32> = moved.into_iter().map(|(_, id)| *id).collect();
        let kept: Vec<u32> = kept.into_iter().map(|(_, id)| *id).collect();
        let changes = noise(world.seed ^ 1, H::DTYPE, moved.len(), world.d);
        let target = overwritten(&table, &moved, &changes)?;
        let rows = select(&target, &world.tokens)?.to_dtype(H::DTYPE.default_row_dtype());
        let layer = Layer::<H>::with_rows(H::source(&table)?, world.token_set()?, &rows)?;
        let hidden = world.hidden::<H>();
        let [got, want] =
            [logits::<H>(&layer, &hidden)?, logits::<H>(&frozen, &hidden)?].map(|x| transposed(&x));
        let others: Vec<u32> = (0u32..).take(world.v).filter(|id| !moved.contains(id)).collect();
        ensure!(kept.iter().all(|id| others.contains(id)), "the case is wrong");
        same("other columns", &select(&got, &others)?, &select(&want, &others)?)
    })
}

pub(super) fn transposed(rows: &TokenRows) -> TokenRows {
    let [n, v] = rows.shape();
    let values = rows.to_f64_vec();
    let turned = (0..v)
        .flat_map(|column| values.iter().skip(column).step_by(v.max(1)).copied())
        .collect();
    // The values are of `rows`' own type, so that the way through `f64` keeps their bits.
    TokenRows::new::<f64>(turned, v, n).map_or_else(|_| rows.clone(), |turned| turned.to_dtype(rows.dtype()))
}

/// The gradient of the hidden states is `upstream · W`, with the trained rows in `W`.
pub fn hidden_states_get_the_gradient_of_the_new_rows<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        let [got, _] = backward::<H>(&world.trained::<H>()?, world)?;
        let table = world.dense::<H>()?;
        let [want, _] = dense_gradients(&world.hidden::<H>(), &table, &world.logits_upstream::<H>());
        close("gradient of the hidden states", &got, &want, H::DTYPE)
    })
}

/// The gradient of the rows is `upstreamᵀ · hidden`, the rows of the trainable tokens in slot order.
pub fn rows_get_the_heads_gradient<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        for layer in [world.fresh::<H>()?, world.trained::<H>()?] {
            let [_, got] = backward::<H>(&layer, world)?;
            let table = world.dense::<H>()?;
            let [_, want] = dense_gradients(&world.hidden::<H>(), &table, &world.logits_upstream::<H>());
            close("gradient of the rows", &got, &world.chosen(&want), H::DTYPE)?;
        }
        Ok(())
    })
}

/// Lookup and head of one pass add their gradients up.
pub fn lookup_and_head_add_up<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        let layer = world.trained::<H>()?;
        let upstream = world.upstream::<H>();
        let pass = Pass {
            lookups: vec![(layer.plan(&world.ids)?, upstream.clone())],
            heads: vec![HeadPass::new(world.hidden::<H>(), world.logits_upstream::<H>())],
            ..Pass::default()
        };
        let got = layer.gradient(&H::backward(&layer, &pass)?.gradients)?;
        let table = world.dense::<H>()?;
        let [_, mut want] = dense_gradients(&world.hidden::<H>(), &table, &world.logits_upstream::<H>());
        let upstream = Exact::of(&upstream);
        for (at, id) in world.ids.iter().enumerate() {
            let to = want.row_mut(*id as usize).iter_mut();
            to.zip(upstream.row(at)).for_each(|(sum, x)| *sum += x);
        }
        close("gradient", &got, &world.chosen(&want), H::DTYPE)
    })
}

/// The embedding's scale, its padding rule and its `max_norm` do not touch the head.
pub fn options_of_the_lookup_do_not_touch_the_head<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[5]);
    let options = LayerOptions {
        padding: Some(Padding {
            token: TokenId(5),
            rule: PaddingRule::NoLookupGradient,
        }),
        scale: Some(EmbedScale::Exact(3.0)),
        scale_grad_by_freq: true,
        max_norm: Some(trainable_tokens_core::MaxNorm::new(0.1)?),
    };
    let (plain, layer) = (world.trained::<H>()?, world.trained::<H>()?.with_options(options));
    let hidden = world.hidden::<H>();
    same(
        "logits",
        &logits::<H>(&layer, &hidden)?,
        &logits::<H>(&plain, &hidden)?,
    )?;
    let [want_hidden, want_rows] = backward::<H>(&plain, &world)?;
    let [hidden, rows] = backward::<H>(&layer, &world)?;
    same("gradient of the hidden states", &hidden, &want_hidden)?;
    same("gradient of the rows", &rows, &want_rows)
}

/// Merged and unmerged heads agree.
pub fn a_merged_head_agrees<H: Harness>() -> Outcome {
    for_all(|world| {
        let (mut layer, hidden) = (world.trained::<H>()?, world.hidden::<H>());
        let before = Exact::of(&logits::<H>(&layer, &hidden)?);
        layer.merge()?;
        close("logits", &logits::<H>(&layer, &hidden)?, &before, H::DTYPE)
    })
}

/// No hidden states give no logits.
pub fn hidden_states_may_be_empty<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let none = TokenRows::zeros(H::DTYPE, 0, 3);
    let got = logits::<H>(&world.trained::<H>()?, &none)?;
    same("no logits", &got, &TokenRows::zeros(H::DTYPE, 0, 7))
}

/// Every token of the head may train.
pub fn every_column_may_train<H: Harness>() -> Outcome {
    let all: Vec<u32> = (0..7).rev().collect();
    let world = World::fixed(7, 3, &all, &[]);
    let hidden = world.hidden::<H>();
    let want = product(&hidden, &world.dense::<H>()?);
    close(
        "logits",
        &logits::<H>(&world.trained::<H>()?, &hidden)?,
        &want,
        H::DTYPE,
    )
}

/// An untied head is a layer of its own: training and merging it leave the embedding alone, and the other way round.
pub fn an_untied_head_has_rows_of_its_own<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        let mut untied = world.clone();
        untied.seed ^= 0xff;
        let (mut embedding, mut head) = (world.trained::<H>()?, untied.trained::<H>()?);
        let hidden = world.hidden::<H>();
        let want = product(&hidden, &untied.dense::<H>()?);
        close("logits", &logits::<H>(&head, &hidden)?, &want, H::DTYPE)?;

        // Each gets the gradient of its own table alone.
        let [_, got] = backward::<H>(&head, &untied)?;
        let upstream = untied.logits_upstream::<H>();
        let [_, want] = dense_gradients(&untied.hidden::<H>(), &untied.dense::<H>()?, &upstream);
        close(
            "gradient of the head's rows",
            &got,
            &untied.chosen(&want),
            H::DTYPE,
        )?;
        let rows_before = lookup::<H>(&embedding, &world.ids)?;
        head.step_with(got, &mut Sgd::new(SgdConfig::default())?, &mut [])?;
        head.merge()?;
        same("rows of the embedding", &embedding.rows()?, &world.rows::<H>())?;
        same(
            "looked-up rows",
            &lookup::<H>(&embedding, &world.ids)?,
            &rows_before,
        )?;

        let logits_before = logits::<H>(&head, &hidden)?;
        embedding.merge()?;
        same("logits", &logits::<H>(&head, &hidden)?, &logits_before)?;
        same(
            "the embedding's table",
            &whole::<H>(&embedding)?,
            &world.dense::<H>()?,
        )
    })
}

/// Written rows are seen by the next logits.
pub fn written_rows_are_seen_by_the_next_logits<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let (mut layer, hidden) = (world.fresh::<H>()?, world.hidden::<H>());
    for round in 0..3 {
        let rows = noise(round, layer.rows()?.dtype(), 2, 3);
        layer.set_rows(&rows)?;
        let want = product(&hidden, &overwritten(&world.table::<H>(), &world.tokens, &rows)?);
        close("logits", &logits::<H>(&layer, &hidden)?, &want, H::DTYPE)?;
    }
    Ok(())
}

//! Writing the rows into the table, and taking them out again.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::rc::Rc;

use trainable_tokens_core::{
    Backend, DType, EmbeddingSource, Error, ErrorKind, LookupPlan, RowMix, RowTransform, Sgd, SgdConfig,
    TokenId, TokenRows, TokenSet, TrainableTokens, WriteRows,
};

use crate::failure::{equal, refused, same};
use crate::world::{World, for_all, lookup, noise, odd_values, overwritten, whole};
use crate::{Harness, Layer, Outcome};

/// Merging writes the rows of the trainable tokens, rounded to the table's type, and no other bit.
pub fn merging_writes_the_rows_and_nothing_else<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let rows = world.rows::<H>();
        let mut layer = Layer::<H>::with_rows(H::source(&table)?, world.token_set()?, &rows)?;
        layer.merge()?;
        same(
            "the table",
            &whole::<H>(&layer)?,
            &overwritten(&table, &world.tokens, &rows)?,
        )
    })
}

/// A lookup gives the same bits before and after merging.
pub fn merged_and_unmerged_lookups_are_equal<H: Harness>() -> Outcome {
    for_all(|world| {
        let mut layer = world.trained::<H>()?;
        let before = lookup::<H>(&layer, &world.ids)?;
        layer.merge()?;
        same("rows", &lookup::<H>(&layer, &world.ids)?, &before)
    })
}

/// Unmerging restores every bit, however often.
pub fn unmerging_restores_every_bit<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let rows = world.rows::<H>();
        let mut layer = Layer::<H>::with_rows(H::source(&table)?, world.token_set()?, &rows)?;
        for _ in 0..3 {
            layer.merge()?;
            layer.unmerge()?;
            same("the table", &whole::<H>(&layer)?, &table)?;
            same("the trained rows", &layer.rows()?, &rows)?;
        }
        Ok(())
    })
}

/// What is restored is what the merge overwrote, not what the table held when the layer was made.
pub fn unmerging_restores_what_was_overwritten<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let tokens: Vec<TokenId> = world.tokens.iter().copied().map(TokenId).collect();
    let mut source = world.fresh::<H>()?.into_source();
    let changed = noise(99, H::DTYPE, 2, 3);
    source.write_rows(&tokens, &changed)?;
    let mut layer = Layer::<H>::with_rows(source, world.token_set()?, &world.rows::<H>())?;
    layer.merge()?;
    layer.unmerge()?;
    same("the rows", &layer.source().read_rows(&tokens)?, &changed)
}

/// A second merge, and an unmerge without a merge, are refused and change nothing.
pub fn merges_do_not_nest<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let mut layer = world.trained::<H>()?;
    refused("unmerging first", layer.unmerge(), ErrorKind::State)?;
    same("the table", &whole::<H>(&layer)?, &world.table::<H>())?;
    layer.merge()?;
    equal("is_merged", &layer.is_merged(), &true)?;
    refused("merging twice", layer.merge(), ErrorKind::State)?;
    same("the table", &whole::<H>(&layer)?, &world.dense::<H>()?)?;
    layer.unmerge()?;
    equal("is_merged", &layer.is_merged(), &false)?;
    refused("unmerging twice", layer.unmerge(), ErrorKind::State)
}

/// A merged layer refuses to train and to take other rows; both are as before then.
pub fn a_merged_layer_does_not_train<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let mut layer = world.trained::<H>()?;
    layer.merge()?;
    let gradient = noise(1, layer.rows()?.dtype(), 2, 3);
    let mut sgd = Sgd::new(SgdConfig::default())?;
    refused(
        "a step",
        layer.step_with(gradient.clone(), &mut sgd, &mut []),
        ErrorKind::State,
    )?;
    refused("other rows", layer.set_rows(&gradient), ErrorKind::State)?;
    same("the trained rows", &layer.rows()?, &world.rows::<H>())?;
    same("the table", &whole::<H>(&layer)?, &world.dense::<H>()?)
}

/// After unmerging, training goes on as if nothing had been merged.
pub fn training_goes_on_after_unmerging<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[5, 1]);
    let [mut layer, mut other] = [world.trained::<H>()?, world.trained::<H>()?];
    layer.merge()?;
    layer.unmerge()?;
    let config = SgdConfig {
        lr: 0.5,
        ..SgdConfig::default()
    };
    for layer in [&mut layer, &mut other] {
        let gradient = noise(1, layer.rows()?.dtype(), 2, 3);
        layer.step_with(gradient, &mut Sgd::new(config)?, &mut [])?;
    }
    same("the trained rows", &layer.rows()?, &other.rows()?)?;
    same(
        "rows",
        &lookup::<H>(&layer, &world.ids)?,
        &lookup::<H>(&other, &world.ids)?,
    )
}

/// A layer without trainable tokens is merged and unmerged like any other; its table keeps every bit.
pub fn no_token_can_be_merged<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[], &[5, 2]);
    let mut layer = world.fresh::<H>()?;
    for _ in 0..2 {
        layer.merge()?;
        equal("is_merged", &layer.is_merged(), &true)?;
        refused("merging twice", layer.merge(), ErrorKind::State)?;
        same("the merged table", &whole::<H>(&layer)?, &world.table::<H>())?;
        layer.unmerge()?;
        equal("is_merged", &layer.is_merged(), &false)?;
        refused("unmerging twice", layer.unmerge(), ErrorKind::State)?;
    }
    same("the table", &whole::<H>(&layer)?, &world.table::<H>())
}

/// A table that refuses to be written while its switch is on.
struct Brittle<S> {
    table: S,
    broken: Rc<Cell<bool>>,
}

impl<S: EmbeddingSource> EmbeddingSource for Brittle<S> {
    type Error = S::Error;

    fn vocab_size(&self) -> usize {
        self.table.vocab_size()
    }
    fn embedding_dim(&self) -> usize {
        self.table.embedding_dim()
    }
    fn dtype(&self) -> DType {
        self.table.dtype()
    }
    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows, S::Error> {
        self.table.read_rows(ids)
    }
}

impl<S: WriteRows> WriteRows for Brittle<S> {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<(), S::Error> {
        if self.broken.get() {
            // Any error will do, if no other part of the layer makes it.
            return Err(Error::NoGradient.into());
        }
        self.table.write_rows(ids, rows)
    }
}

/// A harness's backend over tables that may refuse to be written.
struct OverBrittle<B>(PhantomData<B>);

impl<B: Backend> Backend for OverBrittle<B> {
    type Error = B::Error;
    type Source = Brittle<B::Source>;
    type Delta = B::Delta;
    type Tensor = B::Tensor;
    type Gradients = B::Gradients;

    fn delta(source: &Self::Source, rows: &TokenRows) -> Result<B::Delta, B::Error> {
        B::delta(&source.table, rows)
    }
    fn lookup(
        source: &Self::Source,
        delta: Option<&B::Delta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<B::Tensor, B::Error> {
        B::lookup(&source.table, delta, plan, transform)
    }
    fn logits(
        hidden: B::Tensor,
        source: &Self::Source,
        delta: Option<&B::Delta>,
        tokens: &TokenSet,
    ) -> Result<B::Tensor, B::Error> {
        B::logits(hidden, &source.table, delta, tokens)
    }
    fn combine(deltas: &[&B::Delta], mix: &RowMix) -> Result<B::Delta, B::Error> {
        B::combine(deltas, mix)
    }
    fn num_rows(tensor: &B::Tensor) -> usize {
        B::num_rows(tensor)
    }
    fn split_rows(tensor: B::Tensor, parts: &[Range<usize>]) -> Result<Vec<B::Tensor>, B::Error> {
        B::split_rows(tensor, parts)
    }
    fn join_rows(parts: Vec<B::Tensor>) -> Result<B::Tensor, B::Error> {
        B::join_rows(parts)
    }
    fn gradient(gradients: &B::Gradients, delta: &B::Delta) -> Result<Option<TokenRows>, B::Error> {
        B::gradient(gradients, delta)
    }
}

/// A merge that fails leaves the layer unmerged; an unmerge that fails leaves it merged, and may be tried again.
pub fn a_failed_write_does_not_change_the_state<H: Harness>() -> Outcome {
    for_all(|world| {
        let broken = Rc::new(Cell::new(true));
        let source = Brittle {
            table: H::source(&world.table::<H>())?,
            broken: Rc::clone(&broken),
        };
        let rows = world.rows::<H>();
        let mut layer =
            TrainableTokens::<OverBrittle<H::Backend>>::with_rows(source, world.token_set()?, &rows)?;
        let dense = H::read(&layer.lookup(&world.ids)?)?;

        refused("a failing merge", layer.merge(), ErrorKind::NoGradient)?;
        equal("is_merged after a failed merge", &layer.is_merged(), &false)?;
        same(
            "rows after a failed merge",
            &H::read(&layer.lookup(&world.ids)?)?,
            &dense,
        )?;
        refused("unmerging", layer.unmerge(), ErrorKind::State)?;
        layer.set_rows(&rows)?;

        broken.set(false);
        layer.merge()?;
        broken.set(true);
        for _ in 0..2 {
            refused("a failing unmerge", layer.unmerge(), ErrorKind::NoGradient)?;
            equal("is_merged after a failed unmerge", &layer.is_merged(), &true)?;
            refused("other rows", layer.set_rows(&rows), ErrorKind::State)?;
            same(
                "rows after a failed unmerge",
                &H::read(&layer.lookup(&world.ids)?)?,
                &dense,
            )?;
        }

        broken.set(false);
        layer.unmerge()?;
        equal("is_merged", &layer.is_merged(), &false)?;
        let layer = Layer::<H>::new(layer.into_source().table, world.token_set()?)?;
        same("the table", &whole::<H>(&layer)?, &world.table::<H>())
    })
}

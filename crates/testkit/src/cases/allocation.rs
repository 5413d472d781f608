//! No V in the cost.
//!
//! What a step allocates is bounded below one table, all told where that can be, at once elsewhere: so that no single
//! allocation is a table either.

use trainable_tokens_core::{Adam, AdamConfig, Overlap, RowInit, Sgd, SgdConfig, TokenSet};

use crate::failure::ensure;
use crate::world::noise;
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass, allocated};

const SMALL: usize = 4_000;
const LARGE: usize = 40_000;
const DIM: usize = 128;
const TOKENS: u32 = 20;
const BATCH: usize = 64;

fn token_set(v: usize) -> Result<TokenSet, Failure> {
    let last = u32::try_from(v)? - 1;
    Ok(TokenSet::new((0..TOKENS).map(|slot| last - slot * 3), v)?)
}

/// A layer whose rows differ from the base's.
fn layer<H: Harness>(v: usize) -> Result<Layer<H>, Failure> {
    let source = H::source(&noise(3, H::DTYPE, v, DIM))?;
    let rows = noise(4, H::DTYPE.default_row_dtype(), TOKENS as usize, DIM);
    Ok(Layer::<H>::with_rows(source, token_set(v)?, &rows)?)
}

fn table_bytes<H: Harness>(v: usize) -> usize {
    v * DIM * H::DTYPE.size_in_bytes()
}

/// A batch of which every fourth token trains.
fn ids(v: usize) -> Result<Vec<u32>, Failure> {
    let last = u32::try_from(v)? - 1;
    Ok((0u32..)
        .take(BATCH)
        .map(|at| {
            if at % 4 == 0 {
                last - at % TOKENS * 3
            } else {
                at * 7
            }
        })
        .collect())
}

/// What one step of lookup, backward pass and optimizer allocates, once everything is warm.
fn step_bytes<H: Harness>(v: usize) -> Result<usize, Failure> {
    let (mut layer, ids) = (layer::<H>(v)?, ids(v)?);
    let mut adam = Adam::new(AdamConfig::ADAMW)?;
    let upstream = noise(5, H::DTYPE, BATCH, DIM);
    let mut step = || -> Outcome {
        let plan = layer.plan(&ids)?;
        // A backward pass with explicit gradients runs no forward pass.
        layer.lookup_planned(&plan)?;
        let pass = Pass {
            lookups: vec![(plan, upstream.clone())],
            ..Pass::default()
        };
        let gradients = H::backward(&layer, &pass)?.gradients;
        layer.step(&gradients, &mut adam, &mut [])?;
        Ok(())
    };
    step()?;
    let (result, cost) = allocated(step)?;
    result.map(|()| cost.total)
}

/// A step through the lookup allocates less than a table, all told.
pub fn a_step_allocates_no_table<H: Harness>() -> Outcome {
    let bytes = step_bytes::<H>(LARGE)?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        bytes < table / 2,
        "a step allocates {bytes} bytes, the table has {table}"
    );
    Ok(())
}

/// A step through the lookup costs the same at ten times the vocabulary.
pub fn a_step_costs_the_same_for_any_vocabulary<H: Harness>() -> Outcome {
    let (small, large) = (step_bytes::<H>(SMALL)?, step_bytes::<H>(LARGE)?);
    // The slack is a hundredth of what a table's growth would cost.
    let slack = (table_bytes::<H>(LARGE) - table_bytes::<H>(SMALL)) / 100;
    ensure!(
        large <= small + slack,
        "a step allocates {small} bytes with {SMALL} rows and {large} with {LARGE}"
    );
    Ok(())
}

/// Forward and backward through the head allocate logits, but no table and no gradient of one.
pub fn the_head_allocates_no_table<H: Harness>() -> Outcome {
    let layer = layer::<H>(LARGE)?;
    let pass = Pass {
        heads: vec![HeadPass::new(
            noise(6, H::DTYPE, 1, DIM),
            noise(7, H::DTYPE, 1, LARGE),
        )],
        ..Pass::default()
    };
    let both = || -> Outcome {
        // A backward pass with explicit gradients runs no forward pass.
        layer.logits(H::hidden(&layer, &pass.heads[0].hidden)?)?;
        H::backward(&layer, &pass)?;
        Ok(())
    };
    both()?;
    let (result, cost) = allocated(both)?;
    result?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        cost.growth < table / 2,
        "the head holds {} bytes at once, the table has {table}",
        cost.growth
    );
    Ok(())
}

/// Putting the layer around a table copies no table.
pub fn wrapping_allocates_no_table<H: Harness>() -> Outcome {
    let source = H::source(&noise(3, H::DTYPE, LARGE, DIM))?;
    let tokens = token_set(LARGE)?;
    let (layer, cost) = allocated(|| Layer::<H>::new(source, tokens))?;
    layer?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        cost.total < table / 8,
        "wrapping allocates {} bytes, the table has {table}",
        cost.total
    );
    Ok(())
}

/// Merging and unmerging write rows in place.
pub fn merging_allocates_no_table<H: Harness>() -> Outcome {
    let mut layer = layer::<H>(LARGE)?;
    let mut cycle = || -> Outcome {
        layer.merge()?;
        Ok(layer.unmerge()?)
    };
    cycle()?;
    let (result, cost) = allocated(cycle)?;
    result?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        cost.total < table / 8,
        "merging allocates {} bytes, the table has {table}",
        cost.total
    );
    Ok(())
}

/// Several active adapters, a mixed batch, and merging them all at once, cost rows, not tables.
pub fn several_adapters_allocate_no_table<H: Harness>() -> Outcome {
    let mut layer = layer::<H>(LARGE)?;
    let names = ["default", "second", "third"];
    for (name, salt) in names.into_iter().skip(1).zip(1..) {
        let rows = noise(salt, H::DTYPE.default_row_dtype(), TOKENS as usize, DIM);
        layer.add_adapter_with_rows(name, token_set(LARGE)?, &rows)?;
    }
    let weights = Overlap::WeightedMean(vec![1.0, 2.0, 0.5]);
    let (ids, upstream) = (ids(LARGE)?, noise(5, H::DTYPE, BATCH, DIM));
    let examples = [Some(names[0]), None, Some(names[2]), Some(names[1])];
    let mut all = || -> Outcome {
        layer.activate_overlapping(&names, weights.clone())?;
        let [plan, mixed] = [layer.plan(&ids)?, layer.plan_mixed(&ids, &examples)?];
        // A backward pass with explicit gradients runs no forward pass.
        layer.lookup_planned(&plan)?;
        layer.lookup_planned(&mixed)?;
        let pass = Pass {
            lookups: vec![(plan, upstream.clone()), (mixed, upstream.clone())],
            ..Pass::default()
        };
        H::backward(&layer, &pass)?;
        layer.merge()?;
        Ok(layer.unmerge()?)
    };
    all()?;
    let (result, cost) = allocated(all)?;
    result?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        cost.growth < table / 8,
        "the adapters hold {} bytes at once, the table has {table}",
        cost.growth
    );
    let logits = Pass {
        heads: vec![HeadPass {
            adapters: Some(examples.iter().map(|name| name.map(str::to_owned)).collect()),
            ..HeadPass::new(noise(6, H::DTYPE, 4, DIM), noise(7, H::DTYPE, 4, LARGE))
        }],
        ..Pass::default()
    };
    let both = || -> Outcome {
        layer.logits_mixed(H::hidden(&layer, &logits.heads[0].hidden)?, &examples)?;
        H::backward(&layer, &logits)?;
        Ok(())
    };
    both()?;
    let (result, cost) = allocated(both)?;
    result?;
    ensure!(
        cost.growth < table / 2,
        "a mixed head holds {} bytes at once, the table has {table}",
        cost.growth
    );
    Ok(())
}

/// The optimizer keeps rows, not tables.
pub fn the_optimizer_keeps_rows_only<H: Harness>() -> Outcome {
    let mut layer = layer::<H>(LARGE)?;
    let dtype = H::DTYPE.default_row_dtype();
    let gradient = noise(8, dtype, TOKENS as usize, DIM);
    let mut sgd = Sgd::new(SgdConfig {
        momentum: 0.9,
        ..SgdConfig::default()
    })?;
    let (result, cost) = allocated(|| layer.step_with(gradient, &mut sgd, &mut []))?;
    result?;
    let rows = TOKENS as usize * DIM * dtype.size_in_bytes();
    ensure!(
        cost.total <= 16 * rows,
        "a step allocates {} bytes, the rows have {rows}",
        cost.total
    );
    Ok(())
}

/// Statistics of the whole table are taken from a block of it at a time.
pub fn initialising_allocates_no_table<H: Harness>() -> Outcome {
    let source = H::source(&noise(3, H::DTYPE, LARGE, DIM))?;
    let tokens = TokenSet::new([7, 5], LARGE)?;
    let init: RowInit = "mean-covariance:1:others+norm-match".parse()?;
    let start = || init.rows(&source, &tokens, H::DTYPE.default_row_dtype());
    start()?;
    let (rows, cost) = allocated(start)?;
    rows?;
    let table = table_bytes::<H>(LARGE);
    ensure!(
        cost.growth < table / 2,
        "initialising holds {} bytes at once, the table has {table}",
        cost.growth
    );
    Ok(())
}

//! The operations of a case.

use serde_json::Value;
use trainable_tokens_core::{DType, TokenRows, TokenSet};

use super::compare::Tolerance;
use super::fixture::{Fixture, text};
use super::trajectory;
use crate::failure::{Exact, close, ensure, same};
use crate::world::{lookup, overwritten, select, whole};
use crate::{Failure, Gradients, Harness, Layer, Outcome, Pass, Source};

/// Runs all that the case records.
pub(super) fn run_all<H: Harness>(fixture: &Fixture) -> Outcome {
    let table = fixture.table().dtype();
    ensure!(
        holds(H::DTYPE, table),
        "its table of type {table} needs a harness of that type or a wider one, not {}",
        H::DTYPE
    );
    let mut checks = 0;
    for operation in fixture.operations()? {
        let what = format!("{} {}", text(operation, "op")?, label(operation));
        run::<H>(fixture, operation).map_err(|failure| named(&what, &failure))?;
        checks += 1;
    }
    for (what, recorded, check) in [
        (
            "embed.base",
            fixture.has("embed.base"),
            plain_module::<H> as Check,
        ),
        (
            "forward without PEFT's",
            fixture.peft_refuses("peft_forward"),
            dense_forward::<H>,
        ),
        (
            "backward without PEFT's",
            fixture.peft_refuses("peft_backward"),
            dense_gradient::<H>,
        ),
    ] {
        if recorded {
            check(fixture).map_err(|failure| named(what, &failure))?;
            checks += 1;
        }
    }
    ensure!(checks > 0, "it checks nothing");
    Ok(())
}

type Check = fn(&Fixture) -> Outcome;

/// Whether every value of `narrow` is one of `wide`.
fn holds(wide: DType, narrow: DType) -> bool {
    wide == narrow || wide == DType::F64 || (wide == DType::F32 && narrow != DType::F64)
}

/// What tells an operation from others of its kind.
fn label(operation: &Value) -> &str {
    let label = operation["name"].as_str().or(operation["state"].as_str());
    label.unwrap_or_default()
}

fn named(what: &str, failure: &Failure) -> Failure {
    Failure::new(format!("{}: {}", what.trim_end(), failure.reason()))
}

fn run<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    match text(operation, "op")? {
        "embed_forward" => embed_forward::<H>(fixture, operation),
        "delta_grad" => delta_grad::<H>(fixture, operation),
        "trajectory" => trajectory::run::<H>(fixture, operation),
        "merge" => merge::<H>(fixture, operation, false),
        "unmerge" => merge::<H>(fixture, operation, true),
        _ => Err(Failure::new("the operation is unknown")),
    }
}

/// Rows for the harness's table: the fixture's own type, unless the harness has a wider one.
pub(super) fn input<H: Harness>(rows: &TokenRows) -> TokenRows {
    rows.to_dtype(H::DTYPE)
}

/// A result in the type that PEFT's has: itself, unless the harness's table is wider than the case's.
pub(super) fn output<H: Harness>(fixture: &Fixture, got: TokenRows, want: &TokenRows) -> TokenRows {
    if H::DTYPE == fixture.table().dtype() {
        got
    } else {
        got.to_dtype(want.dtype())
    }
}

/// A layer with these rows, in their type; over a wider table they widen, too.
pub(super) fn layer<H: Harness>(fixture: &Fixture, rows: &TokenRows) -> Result<Layer<H>, Failure> {
    over::<H>(fixture, H::source(&input::<H>(fixture.table()))?, rows)
}

fn over<H: Harness>(fixture: &Fixture, table: Source<H>, rows: &TokenRows) -> Result<Layer<H>, Failure> {
    let rows = if H::DTYPE == fixture.table().dtype() {
        rows.clone()
    } else {
        rows.to_dtype(H::DTYPE.default_row_dtype())
    };
    let layer = Layer::<H>::with_rows(table, fixture.tokens().clone(), &rows)?;
    Ok(layer.with_options(fixture.options()))
}

/// A layer as the library makes it, with rows that are the base's.
fn fresh<H: Harness>(fixture: &Fixture, tokens: TokenSet) -> Result<Layer<H>, Failure> {
    let source = H::source(&input::<H>(fixture.table()))?;
    Ok(Layer::<H>::new(source, tokens)?.with_options(fixture.options()))
}

/// Layers with the adapter's rows, in the type that PEFT loads them in (at least single precision) and in that of the
/// file, over tables that had other rows merged before.
fn trained<H: Harness>(fixture: &Fixture) -> Result<Vec<Layer<H>>, Failure> {
    let stored = fixture.adapter_rows()?;
    let loaded = stored.to_dtype(stored.dtype().default_row_dtype());
    let mut layers = Vec::new();
    for rows in [loaded, stored] {
        let mut before = layer::<H>(fixture, &fixture.initial_rows()?)?;
        before.merge()?;
        before.unmerge()?;
        layers.push(over::<H>(fixture, before.into_source(), &rows)?);
    }
    Ok(layers)
}

/// The module's output for a batch.
fn embed_forward<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let mut layers = match text(operation, "state")? {
        "base" => vec![fresh::<H>(
            fixture,
            TokenSet::new([], fixture.table().num_rows())?,
        )?],
        "noop" => {
            let (initial, fresh) = (
                fixture.initial_rows()?,
                fresh::<H>(fixture, fixture.tokens().clone())?,
            );
            let rows = fresh.rows()?;
            same("rows of a new layer", &rows, &initial.to_dtype(rows.dtype()))?;
            vec![layer::<H>(fixture, &initial)?, fresh]
        }
        "adapter" | "merged" => trained::<H>(fixture)?,
        other => return Err(Failure::new(format!("the state {other} is unknown"))),
    };
    let ids = fixture.ids(text(&operation["inputs"], "ids")?)?;
    let want = fixture.rows(text(operation, "expect")?)?;
    for layer in &mut layers {
        if operation["state"] == "merged" {
            layer.merge()?;
        }
        let (table, rows) = (whole::<H>(layer)?, layer.rows()?);
        let got = output::<H>(fixture, lookup::<H>(layer, &ids)?, &want);
        Tolerance::of(operation)?.check("output", &got, &want)?;
        same("the table after the lookup", &whole::<H>(layer)?, &table)?;
        same("the rows after the lookup", &layer.rows()?, &rows)?;
    }
    Ok(())
}

/// The gradient of the rows for an upstream gradient of the output; it depends on no row.
fn delta_grad<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let ids = fixture.ids(text(&operation["inputs"], "ids")?)?;
    let upstream = fixture.rows(text(&operation["inputs"], "upstream")?)?;
    let want = fixture.rows(text(operation, "expect")?)?;
    let mut layers = trained::<H>(fixture)?;
    layers.push(layer::<H>(fixture, &fixture.initial_rows()?)?);
    for layer in layers {
        let gradients = backward::<H>(&layer, &ids, &upstream)?;
        let got = output::<H>(fixture, layer.gradient(&gradients)?, &want);
        Tolerance::of(operation)?.check("gradient", &got, &want)?;
    }
    Ok(())
}

/// One backward pass from a lookup.
pub(super) fn backward<H: Harness>(
    layer: &Layer<H>,
    ids: &[u32],
    upstream: &TokenRows,
) -> Result<Gradients<H>, Failure> {
    let pass = Pass {
        lookups: vec![(layer.plan(ids)?, input::<H>(upstream))],
        heads: Vec::new(),
    };
    Ok(H::backward(layer, &pass)?.gradients)
}

/// The table after merging, or after merging and unmerging.
fn merge<H: Harness>(fixture: &Fixture, operation: &Value, unmerge: bool) -> Outcome {
    let want = fixture.rows(text(operation, "expect")?)?;
    for mut layer in trained::<H>(fixture)? {
        layer.merge()?;
        if unmerge {
            layer.unmerge()?;
        }
        let got = output::<H>(fixture, whole::<H>(&layer)?, &want);
        Tolerance::of(operation)?.check("table", &got, &want)?;
    }
    Ok(())
}

/// PEFT's plain module: what it returned for the batch of the case's first forward pass, within that one's tolerance.
fn plain_module<H: Harness>(fixture: &Fixture) -> Outcome {
    let mut operations = fixture.operations()?.iter();
    let forward = operations.find(|operation| operation["op"] == "embed_forward");
    let mut operation = forward
        .ok_or("there is no embed_forward to tell its tolerance")?
        .clone();
    operation["state"] = "base".into();
    operation["expect"] = "embed.base".into();
    embed_forward::<H>(fixture, &operation)
}

/// The dense definition of the forward pass: rows of the overwritten table.
fn dense_forward<H: Harness>(fixture: &Fixture) -> Outcome {
    let options = fixture.options();
    ensure!(
        options.transform(fixture.table().dtype()).is_identity(),
        "its option max_norm has no dense definition here"
    );
    let (ids, tokens) = (fixture.ids("input_ids")?, raw(fixture.tokens()));
    let table = overwritten(fixture.table(), &tokens, &fixture.adapter_rows()?)?;
    let want = select(&table, &ids)?;
    for layer in trained::<H>(fixture)? {
        let got = output::<H>(fixture, lookup::<H>(&layer, &ids)?, &want);
        same("output", &got, &want)?;
    }
    Ok(())
}

/// The dense definition of the backward pass: sums of the upstream gradient by token.
fn dense_gradient<H: Harness>(fixture: &Fixture) -> Outcome {
    let options = fixture.options();
    ensure!(
        options.padding.is_none() && !options.scale_grad_by_freq,
        "its options padding_idx and scale_grad_by_freq have no dense definition here"
    );
    let (ids, upstream) = (fixture.ids("input_ids")?, fixture.rows("upstream")?);
    let mut sums = Exact::zeros(fixture.table().num_rows(), fixture.table().embedding_dim());
    let exact = Exact::of(&upstream);
    for (at, id) in ids.iter().enumerate() {
        let sum = sums.row_mut(*id as usize).iter_mut();
        sum.zip(exact.row(at)).for_each(|(sum, x)| *sum += x);
    }
    let want = sums.select(&raw(fixture.tokens()));
    for layer in trained::<H>(fixture)? {
        let got = layer.gradient(&backward::<H>(&layer, &ids, &upstream)?)?;
        close("gradient", &got, &want, H::DTYPE)?;
    }
    Ok(())
}

fn raw(tokens: &TokenSet) -> Vec<u32> {
    tokens.ids().iter().map(|id| id.0).collect()
}

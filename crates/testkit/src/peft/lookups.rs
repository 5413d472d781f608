//! What modules return.

use serde_json::Value;
use trainable_tokens_core::{DType, Element, EmbedScale, TokenAdapter, TokenRows, TokenSet};

use super::adapters::Trained;
use super::compare::Tolerance;
use super::fixture::Fixture;
use super::layers::{added, fresh, frozen, input, layer, output, trained};
use super::module::Module;
use super::value::{only, text, texts};
use crate::failure::{ensure, same};
use crate::world::{lookup, overwritten, select, whole};
use crate::{Failure, Harness, Layer, Outcome};

/// The module's output for a batch; `H` is the harness for the case's table, `B` that for `bfloat16`.
pub(super) fn embed_forward<H: Harness, B: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = [
        "op",
        "state",
        "module",
        "adapter",
        "active",
        "inputs",
        "expect",
        "base_cast",
        "atol",
        "rtol",
        "note",
    ];
    only("the operation", operation, &known)?;
    let module = fixture.module(operation)?;
    match operation["base_cast"].as_str() {
        None if operation["base_cast"].is_null() => forward::<H>(fixture, operation, &module),
        Some("BF16") => forward::<B>(fixture, operation, &module.cast(DType::BF16)),
        _ => Err(Failure::new(format!(
            "the cast to {} is unknown",
            operation["base_cast"]
        ))),
    }
}

fn forward<H: Harness>(fixture: &Fixture, operation: &Value, module: &Module) -> Outcome {
    let ids = fixture.ids(text(&operation["inputs"], "ids")?)?;
    let want = fixture.rows(text(operation, "expect")?)?;
    let tolerance = Tolerance::of(operation)?;
    let state = if Fixture::is_about_names(operation) && operation["state"].is_null() {
        "adapter"
    } else {
        text(operation, "state")?
    };
    let adapters = match state {
        "base" => Vec::new(),
        _ => fixture.adapters(operation, module)?,
    };
    // F3: PEFT looks up by itself, with the factor rounded to the table's type. BART's own embedding multiplies half
    // types by the exact number.
    let rounded = module.options.scale.and_then(|scale| match scale {
        EmbedScale::Exact(factor) => Some(EmbedScale::TableDType(factor)),
        EmbedScale::TableDType(_) => None,
    });
    let rounded = rounded.filter(|_| module.table.dtype().size_in_bytes() < 4 && state != "base");
    let Some(rounded) = rounded else {
        return check::<H>(module, state, &adapters, &ids, &want, tolerance);
    };
    let mut as_peft = module.clone();
    as_peft.options.scale = Some(rounded);
    check::<H>(&as_peft, state, &adapters, &ids, &want, tolerance)?;
    let dense = dense(module, if state == "noop" { &[] } else { &adapters }, &ids)?;
    ensure!(!dense.bits_eq(&want), "PEFT's output is that of the exact factor");
    check::<H>(module, state, &adapters, &ids, &dense, Tolerance::both(0.0))
}

/// Compares outputs of every layer in this state; the table and the rows stay as they are.
fn check<H: Harness>(
    module: &Module,
    state: &str,
    adapters: &[Trained],
    ids: &[u32],
    want: &TokenRows,
    tolerance: Tolerance,
) -> Outcome {
    for mut layer in layers::<H>(module, state, adapters)? {
        if state == "merged" {
            layer.merge()?;
        }
        let (table, rows) = (whole::<H>(&layer)?, rows::<H>(&layer)?);
        let got = output::<H>(module, lookup::<H>(&layer, ids)?, want);
        tolerance.check("output", &got, want)?;
        same("the table after the lookup", &whole::<H>(&layer)?, &table)?;
        for (after, before) in self::rows::<H>(&layer)?.iter().zip(&rows) {
            same("the rows after the lookup", after, before)?;
        }
    }
    Ok(())
}

/// The layers that are in a state; those that are merged have yet to be.
fn layers<H: Harness>(module: &Module, state: &str, adapters: &[Trained]) -> Result<Vec<Layer<H>>, Failure> {
    Ok(match state {
        "base" => vec![frozen::<H>(module)?, fresh::<H>(module, no_tokens(module)?)?],
        "noop" => {
            let mut layers = Vec::new();
            for adapter in adapters {
                let ids: Vec<u32> = adapter.tokens.ids().iter().map(|id| id.0).collect();
                let rows = select(&module.table, &ids)?;
                let rows = rows.to_dtype(module.table.dtype().default_row_dtype());
                let fresh = fresh::<H>(module, adapter.tokens.clone())?;
                let got = fresh.rows()?;
                same("rows of a new layer", &got, &rows.to_dtype(got.dtype()))?;
                let adapter = Trained {
                    rows,
                    ..adapter.clone()
                };
                layers.extend([layer::<H>(module, &[adapter])?, fresh]);
            }
            layers
        }
        "adapter" | "merged" if adapters.is_empty() => {
            // No adapter is active, by name or by being disabled.
            let mut disabled = fresh::<H>(module, no_tokens(module)?)?;
            disabled.disable()?;
            vec![frozen::<H>(module)?, disabled]
        }
        "adapter" | "merged" => trained::<H>(module, adapters)?,
        other => return Err(Failure::new(format!("the state {other} is unknown"))),
    })
}

fn no_tokens(module: &Module) -> Result<TokenSet, Failure> {
    Ok(TokenSet::new([], module.table.num_rows())?)
}

fn rows<H: Harness>(layer: &Layer<H>) -> Result<Vec<TokenRows>, Failure> {
    let rows = layer.adapters().map(TokenAdapter::rows);
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The dense definition of the output: rows of the overwritten table, multiplied as the module's own code does it.
pub(super) fn dense(module: &Module, adapters: &[Trained], ids: &[u32]) -> Result<TokenRows, Failure> {
    ensure!(
        module.options.max_norm.is_none(),
        "its option max_norm has no dense definition here"
    );
    let mut table = module.table.clone();
    for adapter in adapters {
        table = overwritten(&table, &raw(adapter), &adapter.rows)?;
    }
    let rows = select(&table, ids)?;
    let Some(scale) = module.options.scale else {
        return Ok(rows);
    };
    let factor = <f32 as Element>::from_f64(scale.factor(table.dtype()));
    let scaled = rows.to_f32_vec().into_iter().map(|x| x * factor).collect();
    Ok(TokenRows::new::<f32>(scaled, rows.num_rows(), rows.embedding_dim())?.to_dtype(table.dtype()))
}

pub(super) fn raw(adapter: &Trained) -> Vec<u32> {
    adapter.tokens.ids().iter().map(|id| id.0).collect()
}

/// The dense definition of the forward pass, where PEFT's own fails.
pub(super) fn dense_forward<H: Harness>(fixture: &Fixture) -> Outcome {
    let (ids, module) = (fixture.ids("input_ids")?, fixture.first());
    let adapters = fixture.adapters(&Value::Null, module)?;
    let want = dense(module, &adapters, &ids)?;
    for layer in trained::<H>(module, &adapters)? {
        let got = output::<H>(module, lookup::<H>(&layer, &ids)?, &want);
        same("output", &got, &want)?;
    }
    Ok(())
}

/// A batch whose examples have an adapter each, or none: the recorded rows, and those of single runs, bit for bit.
pub(super) fn mixed_batch<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = ["op", "adapter_names", "inputs", "expect", "atol", "rtol"];
    only("the operation", operation, &known)?;
    only("what it expects", &operation["expect"], &["logits", "embed"])?;
    let module = fixture.module(operation)?;
    let names = texts(operation, "adapter_names")?;
    let names: Vec<_> = names
        .into_iter()
        .map(|name| Some(name).filter(|name| *name != "__base__"))
        .collect();
    let mut used: Vec<&str> = names.iter().copied().flatten().collect();
    used.sort_unstable();
    used.dedup();
    let adapters = fixture.adapters(&serde_json::json!({ "active": used }), &module)?;
    let ids = fixture.ids(text(&operation["inputs"], "input_ids")?)?;
    let want = fixture.rows(text(&operation["expect"], "embed")?)?;

    let mut layer = added::<H>(&module, &adapters)?;
    let got = H::read(&layer.lookup_mixed(&ids, &names)?)?;
    same("output", &output::<H>(&module, got.clone(), &want), &want)?;
    ensure!(
        !names.is_empty() && ids.len().is_multiple_of(names.len()),
        "{} ids in {} examples",
        ids.len(),
        names.len()
    );
    let length = ids.len() / names.len();
    for (at, name) in names.iter().enumerate() {
        layer.activate(&name.iter().copied().collect::<Vec<_>>())?;
        let example = at * length..(at + 1) * length;
        let alone = lookup::<H>(&layer, &ids[example.clone()])?;
        let rows: Vec<u32> = example.map(u32::try_from).collect::<Result<_, _>>()?;
        same(&format!("example {at} alone"), &alone, &select(&got, &rows)?)?;
    }
    same("the table", &whole::<H>(&layer)?, &input::<H>(&module.table))
}

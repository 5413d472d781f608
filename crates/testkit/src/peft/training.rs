//! What the training of a whole model tells without the model: where its rows start and end, and the optimizer.

use serde_json::Value;
use trainable_tokens_core::TokenRows;

use super::adapters::Trained;
use super::compare::Tolerance;
use super::fixture::Fixture;
use super::layers::{layer, output};
use super::lookups::raw;
use super::optimizer::optimizer;
use super::trajectory::part;
use super::value::{count, only, text};
use crate::failure::{ensure, same};
use crate::world::select;
use crate::{Failure, Harness, Outcome};

/// The rows of PEFT's training start as the base's and end as the adapter's file has them. Where its gradients are
/// recorded, a layer that is given them follows its rows. Losses and gradients need the model.
pub(super) fn train<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = [
        "op",
        "loss",
        "optimizer",
        "steps",
        "init",
        "inputs",
        "expect",
        "atol",
        "rtol",
    ];
    only("the operation", operation, &known)?;
    only(
        "what it expects",
        &operation["expect"],
        &["losses", "grads", "deltas"],
    )?;
    let deltas = text(&operation["expect"], "deltas")?;
    let Some(prefix) = deltas.strip_suffix('*') else {
        let [adapter] = &fixture.adapters(&Value::Null, fixture.first())?[..] else {
            return Err(Failure::new("it has not one adapter for the module"));
        };
        let deltas = fixture.rows(deltas)?;
        ends::<H>(fixture, operation, "", adapter, &deltas)?;
        let grads = fixture.rows(text(&operation["expect"], "grads")?)?;
        return follow::<H>(fixture, operation, adapter, &deltas, &grads);
    };
    // One tensor for each parameter of LoRA that holds rows, named as PEFT names parameters.
    ensure!(operation["init"] == "init.*", "init is {}", operation["init"]);
    let names: Vec<_> = fixture
        .names()
        .filter_map(|name| name.strip_prefix(prefix))
        .collect();
    ensure!(!names.is_empty(), "no {deltas} is recorded");
    for name in names {
        let path = name
            .strip_prefix("base_model.model.")
            .and_then(|name| name.strip_suffix(".token_adapter.trainable_tokens_delta.default"))
            .ok_or_else(|| format!("the parameter {name} is unknown"))?;
        let module = fixture.module(&serde_json::json!({ "module": path }))?;
        let adapters = fixture.adapters(&Value::Null, &module)?;
        let adapter = adapters
            .first()
            .ok_or_else(|| format!("the adapter has no rows of {path}"))?;
        let deltas = fixture.rows(&format!("{prefix}{name}"))?;
        ends::<H>(fixture, operation, path, adapter, &deltas)?;
        let start = part(&deltas, 0, adapter.tokens.len())?;
        same("the first rows", &fixture.rows(&format!("init.{name}"))?, &start)?;
    }
    Ok(())
}

/// The first and the last rows.
fn ends<H: Harness>(
    fixture: &Fixture,
    operation: &Value,
    path: &str,
    adapter: &Trained,
    deltas: &TokenRows,
) -> Outcome {
    let module = match path {
        "" => fixture.first().clone(),
        path => fixture.module(&serde_json::json!({ "module": path }))?,
    };
    let k = adapter.tokens.len();
    let base = select(&module.table, &raw(adapter))?.to_dtype(deltas.dtype());
    same("rows before the first step", &part(deltas, 0, k)?, &base)?;
    let fresh = super::layers::fresh::<H>(&module, adapter.tokens.clone())?;
    let rows = output::<H>(&module, fresh.rows()?, deltas);
    same("rows of a new layer", &rows, &base)?;
    let last = part(deltas, count(operation, "steps")?, k)?;
    same("rows after the last step", &last, &adapter.rows)
}

/// Takes the steps with PEFT's gradients.
fn follow<H: Harness>(
    fixture: &Fixture,
    operation: &Value,
    adapter: &Trained,
    deltas: &TokenRows,
    grads: &TokenRows,
) -> Outcome {
    let (module, k) = (fixture.first(), adapter.tokens.len());
    let start = Trained {
        rows: part(deltas, 0, k)?,
        ..adapter.clone()
    };
    let mut layer = layer::<H>(module, &[start])?;
    let mut optimizer = optimizer(&operation["optimizer"])?.build()?;
    for step in 0..count(operation, "steps")? {
        let gradient = part(grads, step, k)?;
        let gradient = gradient.to_dtype(layer.rows()?.dtype());
        layer.step_with(gradient, &mut *optimizer, &mut [])?;
        let want = part(deltas, step + 1, k)?;
        let got = output::<H>(module, layer.rows()?, &want);
        Tolerance::both(2e-6).check(&format!("rows after step {step}"), &got, &want)?;
    }
    Ok(())
}

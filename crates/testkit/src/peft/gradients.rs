//! Gradients of lookups.

use serde_json::Value;
use trainable_tokens_core::TokenRows;

use super::adapters::Trained;
use super::compare::Tolerance;
use super::fixture::Fixture;
use super::layers::{input, layer, output, trained};
use super::lookups::raw;
use super::value::{only, text};
use crate::failure::{Exact, close, ensure};
use crate::world::select;
use crate::{Failure, Gradients, Harness, Layer, Outcome, Pass};

/// The gradient of the rows for an upstream gradient of the output, of each adapter; it depends on no row.
pub(super) fn delta_grad<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = [
        "op", "module", "adapter", "active", "inputs", "expect", "atol", "rtol", "note",
    ];
    only("the operation", operation, &known)?;
    let module = fixture.module(operation)?;
    let adapters = fixture.adapters(operation, &module)?;
    ensure!(!adapters.is_empty(), "no adapter has rows of the module");
    let ids = fixture.ids(text(&operation["inputs"], "ids")?)?;
    let upstream = fixture.rows(text(&operation["inputs"], "upstream")?)?;
    let mut layers = trained::<H>(&module, &adapters)?;
    let initial = adapters.iter().map(|adapter| {
        let rows = select(&module.table, &raw(adapter))?;
        Ok(Trained {
            rows: rows.to_dtype(module.table.dtype().default_row_dtype()),
            ..adapter.clone()
        })
    });
    layers.push(layer::<H>(
        &module,
        &initial.collect::<Result<Vec<_>, Failure>>()?,
    )?);
    for layer in layers {
        let gradients = backward::<H>(&layer, &ids, &upstream)?;
        for adapter in &adapters {
            let expect = match &operation["expect"] {
                Value::Object(of) => of.get(&adapter.name).and_then(Value::as_str),
                expect => expect.as_str(),
            };
            let expect = expect.ok_or_else(|| format!("it expects nothing of {}", adapter.name))?;
            let want = fixture.rows(expect)?;
            let got = layer.adapter(&adapter.name)?.gradient(&gradients)?;
            let got = output::<H>(&module, got, &want);
            Tolerance::of(operation)?.check("gradient", &got, &want)?;
        }
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
        ..Pass::default()
    };
    Ok(H::backward(layer, &pass)?.gradients)
}

/// The dense definition of the backward pass: sums of the upstream gradient by token. For modules with `sparse=True`,
/// where PEFT's own fails.
pub(super) fn dense_gradient<H: Harness>(fixture: &Fixture) -> Outcome {
    let (module, options) = (fixture.first(), fixture.options());
    ensure!(
        options.padding.is_none() && options.scale.is_none() && !options.scale_grad_by_freq,
        "its options padding_idx, embed_scale and scale_grad_by_freq have no dense definition here"
    );
    let (ids, upstream) = (fixture.ids("input_ids")?, fixture.rows("upstream")?);
    let mut sums = Exact::zeros(module.table.num_rows(), module.table.embedding_dim());
    let exact = Exact::of(&upstream);
    for (at, id) in ids.iter().enumerate() {
        let sum = sums.row_mut(*id as usize).iter_mut();
        sum.zip(exact.row(at)).for_each(|(sum, x)| *sum += x);
    }
    let adapters = fixture.adapters(&Value::Null, module)?;
    for layer in trained::<H>(module, &adapters)? {
        let gradients = backward::<H>(&layer, &ids, &upstream)?;
        for adapter in &adapters {
            let got = layer.adapter(&adapter.name)?.gradient(&gradients)?;
            close("gradient", &got, &sums.select(&raw(adapter)), H::DTYPE)?;
        }
    }
    Ok(())
}

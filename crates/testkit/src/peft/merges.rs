//! Rows written into tables, and taken out again.

use serde_json::Value;
use trainable_tokens_core::{ErrorKind, MergeCheck, Overlap, TokenRows};
use trainable_tokens_format::{Adapter, BaseCheck, Error};

use super::adapters::Trained;
use super::compare::Tolerance;
use super::fixture::Fixture;
use super::layers::{added, output, trained};
use super::lookups::raw;
use super::module::Module;
use super::value::{flag, only, text, texts};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{overwritten, whole};
use crate::{Failure, Harness, Outcome};

/// What becomes of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Rows are merged into it.
    Merged,
    /// They are also taken out again.
    Unmerged,
}

/// The table after merging, or after merging and unmerging; or the refusal of a safe merge.
pub(super) fn merge<H: Harness>(fixture: &Fixture, operation: &Value, until: Until) -> Outcome {
    let known = [
        "op",
        "base",
        "module",
        "adapter",
        "adapters",
        "safe_merge",
        "expect",
        "peft",
        "nan_equal",
        "atol",
        "rtol",
        "note",
    ];
    only("the operation", operation, &known)?;
    let module = fixture.module(operation)?;
    let adapters = fixture.adapters(operation, &module)?;
    if until == Until::Merged && shares_a_table(fixture, operation, &module)? {
        return tied_tokens(fixture, operation, &module);
    }
    let dense = dense(&module, &adapters)?;
    let check = match operation.get("safe_merge") {
        Some(_) if flag(operation, "safe_merge")? => MergeCheck::Finite,
        _ => MergeCheck::Unchecked,
    };
    if check == MergeCheck::Finite {
        // F13: PEFT scans the whole merged matrix; here only the rows that are written count. They differ where the base
        // itself has a value that is not finite.
        let peft_refuses = operation["peft"]["status"] == "error";
        equal(
            "PEFT's refusal",
            &peft_refuses,
            &dense.first_non_finite().is_some(),
        )?;
    }
    for mut layer in trained::<H>(&module, &adapters)? {
        let before = whole::<H>(&layer)?;
        if adapters.is_empty() {
            refused("a merge of nothing", layer.merge(), ErrorKind::State)?;
        } else if check == MergeCheck::Finite && writes_non_finite::<H>(&adapters) {
            refused("a safe merge", layer.merge_checked(check), ErrorKind::NonFinite)?;
            ensure!(!layer.is_merged(), "the layer is merged after an error");
            same("the table after an error", &whole::<H>(&layer)?, &before)?;
            continue;
        } else {
            layer.merge_checked(check)?;
            if until == Until::Unmerged {
                layer.unmerge()?;
            }
        }
        let (want, tolerance) = match operation.get("expect") {
            Some(_) => (
                fixture.rows(text(operation, "expect")?)?,
                Tolerance::of(operation)?,
            ),
            // A safe merge that only records its outcome.
            None => (dense.clone(), Tolerance::both(0.0)),
        };
        let got = output::<H>(&module, whole::<H>(&layer)?, &want);
        tolerance.check("table", &got, &want)?;
    }
    Ok(())
}

/// The dense definition of a merge.
fn dense(module: &Module, adapters: &[Trained]) -> Result<TokenRows, Failure> {
    let mut table = module.table.clone();
    for adapter in adapters {
        table = overwritten(&table, &raw(adapter), &adapter.rows)?;
    }
    Ok(table)
}

fn writes_non_finite<H: Harness>(adapters: &[Trained]) -> bool {
    let mut rows = adapters
        .iter()
        .map(|adapter| adapter.rows.to_dtype(H::DTYPE).first_non_finite());
    rows.any(|found| found.is_some())
}

/// Whether another module of the adapter has rows of its own for the same table.
fn shares_a_table(fixture: &Fixture, operation: &Value, module: &Module) -> Result<bool, Failure> {
    if Fixture::is_about_names(operation) {
        return Ok(false);
    }
    let dir = operation["adapter"].as_str().unwrap_or("adapter");
    let adapter = Adapter::read(fixture.dir().join(dir))?;
    let mut tables = 0;
    for other in adapter.modules() {
        let other = fixture.module(&serde_json::json!({
            "module": other.path(), "base": operation["base"]
        }))?;
        tables += usize::from(other.tensor == module.tensor);
    }
    Ok(tables > 1)
}

/// F8: PEFT trains different tokens for a tied model's embedding and head, unmerged as two sets of rows over one matrix,
/// and merges both into it, so that outputs change. Its numbers are those; here such an adapter is refused for the model.
fn tied_tokens(fixture: &Fixture, operation: &Value, module: &Module) -> Outcome {
    let dir = operation["adapter"].as_str().unwrap_or("adapter");
    let adapter = Adapter::read(fixture.dir().join(dir))?;
    let mut table = module.table.clone();
    for part in adapter.modules() {
        table = overwritten(&table, part.token_indices(), part.rows())?;
    }
    let want = fixture.rows(text(operation, "expect")?)?;
    same("the table with the rows of all modules", &table, &want)?;
    let base = fixture.base(operation)?;
    match adapter.check_against(&base, BaseCheck::Fits) {
        Err(Error::TiedTokens { .. }) => {}
        other => {
            return Err(Failure::new(format!(
                "different tokens of a tied model give {other:?}, expected a refusal"
            )));
        }
    }
    ensure!(
        adapter.replacements(&base).is_err(),
        "they are merged all the same"
    );
    Ok(())
}

/// What PEFT refuses of adapters that share tokens, at forward or merge: here they are refused when they are activated
/// or merged, and nothing changes.
pub(super) fn overlap<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = ["op", "on", "active", "adapters", "after_merging", "peft"];
    only("the operation", operation, &known)?;
    equal(
        "PEFT's outcome",
        &operation["peft"]["status"],
        &Value::from("error"),
    )?;
    let module = fixture.module(operation)?;
    let before = match operation.get("after_merging") {
        Some(_) => texts(operation, "after_merging")?,
        None => Vec::new(),
    };
    let (field, on) = match text(operation, "on")? {
        "forward" => ("active", "activating"),
        "merge" => ("adapters", "merging"),
        other => return Err(Failure::new(format!("an error on {other} is unknown"))),
    };
    let names = texts(operation, field)?;
    let all: Vec<_> = before.iter().chain(&names).copied().collect();
    let adapters = fixture.adapters(&serde_json::json!({ "active": all }), &module)?;
    let mut layer = added::<H>(&module, &adapters)?;
    let check = MergeCheck::Unchecked;
    if !before.is_empty() {
        layer.merge_adapters(&before, &Overlap::Refuse, check)?;
    }
    let table = whole::<H>(&layer)?;
    let result = if on == "merging" {
        layer.merge_adapters(&names, &Overlap::Refuse, check)
    } else {
        layer.activate(&names).map_err(Into::into)
    };
    refused(on, result, ErrorKind::Overlap)?;
    same("the table after an error", &whole::<H>(&layer)?, &table)?;
    equal("active adapters", &layer.active_names().count(), &0)?;
    equal(
        "merges",
        &layer.merges().count(),
        &usize::from(!before.is_empty()),
    )
}

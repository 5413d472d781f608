//! The operations of a case, and what it records besides.

use serde_json::{Value, json};

use super::fixture::Fixture;
use super::gradients::{delta_grad, dense_gradient};
use super::layers::holds;
use super::lookups::{dense_forward, embed_forward, mixed_batch};
use super::merges::{Until, merge, overlap};
use super::value::text;
use super::{files, keys, targets, training, trajectory, whole_model};
use crate::failure::{ensure, same};
use crate::{Failure, Harness, Outcome};

/// Runs all that the case records but what needs the whole model.
pub(super) fn run_all<H: Harness, B: Harness>(fixture: &Fixture) -> Outcome {
    let table = fixture.table().dtype();
    ensure!(
        holds(H::DTYPE, table),
        "its table of type {table} needs a harness of that type or a wider one, not {}",
        H::DTYPE
    );
    let mut checks = 0;
    let recorded = besides(fixture)?;
    for operation in fixture.operations()?.iter().chain(&recorded) {
        let what = format!("{} {}", text(operation, "op")?, label(operation));
        checks += usize::from(run::<H, B>(fixture, operation).map_err(|failure| named(&what, &failure))?);
    }
    let stated = |field: &str| !fixture.json()[field].is_null();
    let stated_checks: [(&str, bool, Check); 9] = [
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
        (
            "after the forward pass",
            fixture.has("base.after_forward"),
            untouched,
        ),
        ("adapters", stated("adapters"), files::adapters),
        (
            "merged_checkpoint",
            stated("merged_checkpoint"),
            files::changed_tensors,
        ),
        ("resized vocabulary", stated("new_vocab"), files::resized),
        ("variants", stated("variants"), keys::variants),
        ("matched_modules", stated("matched_modules"), targets::matched),
        ("wrapped_modules", stated("wrapped_modules"), targets::wrapped),
    ];
    for (what, is_stated, check) in stated_checks {
        if is_stated {
            check(fixture).map_err(|failure| named(what, &failure))?;
            checks += usize::from(what != "adapters");
        }
    }
    ensure!(checks > 0, "it checks nothing");
    whole_model::expect_all_read(fixture)
}

type Check = fn(&Fixture) -> Outcome;

/// What tells an operation from others of its kind.
fn label(operation: &Value) -> String {
    let fields = ["name", "state", "expect"].into_iter();
    let found = fields.filter_map(|field| operation[field].as_str());
    found.collect::<Vec<_>>().join(" ")
}

fn named(what: &str, failure: &Failure) -> Failure {
    Failure::new(format!("{}: {}", what.trim_end(), failure.reason()))
}

/// Runs an operation, unless it is one on the whole model: false then.
fn run<H: Harness, B: Harness>(fixture: &Fixture, operation: &Value) -> Result<bool, Failure> {
    let outcome = match text(operation, "op")? {
        "embed_forward" => embed_forward::<H, B>(fixture, operation),
        // Its upstream gradient comes from the model's loss.
        "delta_grad" if operation["inputs"]["labels"].is_string() => return Ok(false),
        "delta_grad" => delta_grad::<H>(fixture, operation),
        "trajectory" => trajectory::run::<H>(fixture, operation),
        "train" => training::train::<H>(fixture, operation),
        "merge" => merge::<H>(fixture, operation, Until::Merged),
        "unmerge" => merge::<H>(fixture, operation, Until::Unmerged),
        "mixed_batch" => mixed_batch::<H>(fixture, operation),
        "lora_merge" => files::lora_merge(fixture, operation),
        "roundtrip" => files::roundtrip(fixture, operation),
        "merged_checkpoint" => files::merged_checkpoint(fixture, operation),
        "expect_error" if operation["on"] == "attach" => targets::attach(fixture, operation),
        "expect_error" => overlap::<H>(fixture, operation),
        "logits" => return Ok(false),
        _ => Err(Failure::new("the operation is unknown")),
    };
    outcome.map(|()| true)
}

/// Operations for what is recorded without one, with the inputs and the tolerance of the case's first forward pass.
fn besides(fixture: &Fixture) -> Result<Vec<Value>, Failure> {
    let operations = fixture.operations()?;
    let is_expected = |name: &str| operations.iter().any(|operation| operation["expect"] == name);
    let forward = operations.iter().find(|it| it["op"] == "embed_forward");
    let first = |state: &str, expect: &str| -> Result<Value, Failure> {
        let mut operation = forward
            .ok_or("there is no embed_forward to tell its tolerance")?
            .clone();
        operation["state"] = state.into();
        operation["expect"] = expect.into();
        Ok(operation)
    };
    let mut besides = Vec::new();
    for name in fixture.names().filter(|name| !is_expected(name)) {
        besides.push(match name {
            "embed.base" => first("base", name)?,
            "embed.base_bf16" | "embed.noop_bf16" => {
                let cast = operations.iter().find(|it| it["base_cast"] == "BF16");
                let mut operation = cast.ok_or("nothing tells how it is cast")?.clone();
                let state = name.trim_start_matches("embed.").trim_end_matches("_bf16");
                operation["state"] = state.into();
                operation["expect"] = name.into();
                operation
            }
            "unmerged" => json!({ "op": "unmerge", "expect": name, "atol": 0.0, "rtol": 0.0 }),
            _ => {
                if let Some(adapters) = name.strip_prefix("embed.merged.") {
                    let mut operation = first("merged", name)?;
                    operation["active"] = adapters.split('+').collect();
                    besides.push(operation);
                } else if let Some(module) = name.strip_prefix("merged.") {
                    // Rows are copied; what LoRA adds to other weights is a sum in another order.
                    let (op, atol) = if whole_model::is_table(fixture, module) {
                        ("merge", 0.0)
                    } else {
                        ("lora_merge", 1e-6)
                    };
                    besides.push(json!({
                        "op": op, "module": module, "expect": name, "atol": atol, "rtol": atol
                    }));
                }
                continue;
            }
        });
    }
    Ok(besides)
}

/// PEFT's forward pass changes neither the table nor the rows, with `max_norm` either.
fn untouched(fixture: &Fixture) -> Outcome {
    let table = fixture.rows("base.after_forward")?;
    same("the table", &table, fixture.table())?;
    same(
        "the rows",
        &fixture.rows("delta.after_forward")?,
        &fixture.adapter_rows()?,
    )
}

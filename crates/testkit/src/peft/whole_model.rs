//! Operations on whole models: which there are, and which of them nothing in this workspace runs yet.

use serde_json::{Value, json};

use super::fixture::Fixture;
use crate::failure::ensure;
use crate::{Failure, Outcome};

/// An operation that needs a model around the table: outputs, a gradient of its loss, or training.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WholeModel {
    /// What tells it from the others of its case: the tensor that it expects, or `train`.
    pub name: String,
    /// The operation as `case.json` has it.
    pub operation: Value,
}

const LOGITS: [&str; 4] = ["logits.base", "logits.noop", "logits.trained", "logits.merged"];
const MODEL: &[&str] = &[LOGITS[0], LOGITS[1], LOGITS[2], LOGITS[3], "train"];

/// The operations on whole models that are not run: the case, their names, and the reason. All others are run by
/// `trainable-tokens-trainer`.
pub const NOT_RUN: &[(&str, &[&str], &str)] = &[
    ("bart_tied", MODEL, "needs a bart decoder"),
    ("t5_tied", MODEL, "needs a t5 decoder"),
    (
        "lora_dict_tied_different",
        &[LOGITS[2], LOGITS[3], "train"],
        "is refused: the tokens of tied modules differ",
    ),
];

/// Why an operation of a case is not run, if it is not.
pub fn not_run(case: &str, name: &str) -> Option<&'static str> {
    let entry = NOT_RUN
        .iter()
        .find(|(of, names, _)| *of == case && names.contains(&name));
    entry.map(|(_, _, reason)| *reason)
}

impl Fixture {
    /// The operations that need the whole model; logits that are recorded without an operation have the inputs and the
    /// tolerance of the case's first one.
    ///
    /// # Errors
    ///
    /// If `case.json` is malformed.
    pub fn whole_model(&self) -> Result<Vec<WholeModel>, Failure> {
        let mut found = Vec::new();
        for operation in self.operations()? {
            let name = match operation["op"].as_str() {
                Some("logits") => &operation["expect"],
                Some("delta_grad") if operation["inputs"]["labels"].is_string() => &operation["expect"],
                Some("train") => &operation["op"],
                Some("mixed_batch") => &operation["expect"]["logits"],
                _ => continue,
            };
            let name = name.as_str().ok_or("an operation expects nothing")?.to_owned();
            let operation = operation.clone();
            found.push(WholeModel { name, operation });
        }
        let first = found.iter().find(|it| it.operation["op"] == "logits");
        // PEFT refused to make the adapter, so that only the model by itself was run.
        let alone = || json!({ "op": "logits", "inputs": { "input_ids": "probe.input_ids" }, "atol": 1e-4, "rtol": 1e-4 });
        let first = first.map_or_else(alone, |it| it.operation.clone());
        for name in self.names() {
            let state = name.strip_prefix("logits.");
            let is_known = found.iter().any(|it| it.name == name);
            if let Some(state) = state.filter(|_| !is_known) {
                let mut operation = first.clone();
                operation["state"] = state.into();
                operation["expect"] = name.into();
                found.push(WholeModel {
                    name: name.to_owned(),
                    operation,
                });
            }
        }
        Ok(found)
    }
}

/// Whether the module has a table over the vocabulary: it is described, or tied to one that is, or the head.
pub(super) fn is_table(fixture: &Fixture, module: &str) -> bool {
    let described = fixture.json()["modules"].as_array().into_iter().flatten();
    let mut described = described.filter_map(|module| module["path"].as_str());
    described.any(|path| path == module)
        || !fixture.json()["wrapped_modules"][module].is_null()
        || module == "lm_head"
}

/// Every recorded tensor was looked at or belongs to an operation on the whole model.
pub(super) fn expect_all_read(fixture: &Fixture) -> Outcome {
    let whole_model = fixture.whole_model()?;
    let mut theirs: Vec<&str> = whole_model.iter().flat_map(|it| texts(&it.operation)).collect();
    if whole_model
        .iter()
        .any(|it| it.operation["inputs"]["labels"].is_string())
    {
        theirs.push("loss");
    }
    if fixture.peft_refuses("peft_init") {
        // Batches for a training that did not begin.
        theirs.push("batch.*");
    }
    let is_theirs = |name: &str| {
        theirs.iter().any(|text| match text.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *text == name,
        })
    };
    let unread: Vec<_> = fixture.unread().filter(|name| !is_theirs(name)).collect();
    ensure!(unread.is_empty(), "nothing checks {unread:?}");
    Ok(())
}

/// All texts in a value.
fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(items) => items.iter().flat_map(texts).collect(),
        Value::Object(fields) => fields.values().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

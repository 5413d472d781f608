//! Checks the fields of a config.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::{AdapterConfig, PEFT_TYPE, TargetModules, TaskType};
use crate::error::{Error, Result};
use crate::json::Json;

pub(super) fn text(text: &str, path: &Path) -> Result<AdapterConfig> {
    let json = |reason: String| Error::Json {
        path: path.to_owned(),
        reason,
    };
    match Json::parse(text).map_err(json)? {
        Json::Object(fields) => config(fields, path),
        other => Err(json(format!("expected an object, got {}", other.brief()))),
    }
}

pub(super) fn config(fields: BTreeMap<String, Json>, path: &Path) -> Result<AdapterConfig> {
    let field = |name: &str, reason: String| Error::field(path, name, reason);
    check_peft_type(fields.get("peft_type"), path)?;
    for name in ["peft_version", "base_model_name_or_path", "revision"] {
        if let Some(value) = fields.get(name)
            && !matches!(value, Json::String(_) | Json::Null)
        {
            return Err(field(name, expected("a string or null", value)));
        }
    }
    for name in ["init_weights", "inference_mode"] {
        if let Some(value) = fields.get(name)
            && !matches!(value, Json::Bool(_))
        {
            return Err(field(name, expected("true or false", value)));
        }
    }
    Ok(AdapterConfig {
        token_indices: token_indices(fields.get("token_indices"), path)?,
        target_modules: target_modules(fields.get("target_modules"))
            .map_err(|reason| field("target_modules", reason))?,
        task_type: task_type(fields.get("task_type")).map_err(|reason| field("task_type", reason))?,
        fields,
    })
}

fn expected(what: &str, got: &Json) -> String {
    format!("expected {what}, got {}", got.brief())
}

fn check_peft_type(value: Option<&Json>, path: &Path) -> Result<()> {
    match value {
        Some(Json::String(kind)) if kind == PEFT_TYPE => Ok(()),
        Some(Json::String(kind)) if kind == "LORA" => Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("LoRA adapters are not supported yet; only peft_type {PEFT_TYPE} is"),
        }),
        Some(other) => Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!(
                "peft_type {} is not supported; only {PEFT_TYPE:?} is",
                other.brief()
            ),
        }),
        None => Err(Error::field(
            path,
            "peft_type",
            format!("it is missing; expected {PEFT_TYPE:?}"),
        )),
    }
}

/// A list of distinct integers that fit 32 bits, written as integers. Anything that merely converts is refused:
/// PEFT takes `true` for 1 and lets the last of equal ids win.
fn token_indices(value: Option<&Json>, path: &Path) -> Result<Vec<u32>> {
    const FIELD: &str = "token_indices";
    let items = match value {
        Some(Json::Array(items)) => items,
        Some(other) => return Err(Error::field(path, FIELD, expected("a list of token ids", other))),
        None => {
            let reason = "it is missing; the rows cannot be told apart without it";
            return Err(Error::field(path, FIELD, reason));
        }
    };
    let mut slot_of = HashMap::with_capacity(items.len());
    let mut ids = Vec::with_capacity(items.len());
    for (slot, item) in items.iter().enumerate() {
        let refuse = |reason: String| Error::field(path, format!("{FIELD}[{slot}]"), reason);
        let id = match item {
            Json::Number(text) => text.parse::<u32>().ok(),
            _ => None,
        };
        let id = id.ok_or_else(|| refuse(expected("an integer from 0 to 4294967295", item)))?;
        if let Some(first) = slot_of.insert(id, slot) {
            return Err(refuse(format!("token id {id} already stands at index {first}")));
        }
        ids.push(id);
    }
    Ok(ids)
}

fn target_modules(value: Option<&Json>) -> Result<TargetModules, String> {
    let target = match value {
        None | Some(Json::Null) => TargetModules::Default,
        Some(Json::String(pattern)) => TargetModules::Pattern(pattern.clone()),
        Some(Json::Array(items)) => {
            let entries = items.iter().map(|item| match item {
                Json::String(entry) => Ok(entry.clone()),
                other => Err(expected("module names", other)),
            });
            TargetModules::List(entries.collect::<Result<_, _>>()?)
        }
        Some(other) => return Err(expected("a list, a string or null", other)),
    };
    target.check()?;
    Ok(target)
}

fn task_type(value: Option<&Json>) -> Result<Option<TaskType>, String> {
    match value {
        None | Some(Json::Null) => Ok(None),
        Some(other) => {
            let task = match other {
                Json::String(name) => TaskType::from_name(name),
                _ => None,
            };
            let names = TaskType::ALL.map(TaskType::as_str).join(", ");
            let reason = || expected(&format!("null or one of {names}"), other);
            task.map(Some).ok_or_else(reason)
        }
    }
}

//! Checks the fields of a config.

use std::collections::BTreeMap;
use std::path::Path;

use super::{AdapterConfig, PeftType, TargetModules, TaskType, TokenIndices, expected, target, tokens};
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
    let kind = peft_type(fields.get("peft_type"), path)?;
    for name in ["peft_version", "base_model_name_or_path", "revision"] {
        if let Some(value) = fields.get(name)
            && !matches!(value, Json::String(_) | Json::Null)
        {
            return Err(field(name, expected("a string or null", value)));
        }
    }
    let own = match kind {
        PeftType::TrainableTokens => "init_weights",
        PeftType::Lora => "ensure_weight_tying",
    };
    for name in [own, "inference_mode"] {
        if let Some(value) = fields.get(name)
            && !matches!(value, Json::Bool(_))
        {
            return Err(field(name, expected("true or false", value)));
        }
    }
    let ids = fields.get(kind.tokens_field());
    let token_indices = match kind {
        PeftType::TrainableTokens => tokens::required(ids, kind.tokens_field(), path)?,
        PeftType::Lora => tokens::of_lora(ids, kind.tokens_field(), path)?,
    };
    if kind == PeftType::Lora {
        check_modules_to_save(fields.get("modules_to_save"), &token_indices, path)?;
    }
    let target_modules = target_modules(fields.get("target_modules"), kind)
        .map_err(|reason| field("target_modules", reason))?;
    Ok(AdapterConfig {
        kind,
        token_indices,
        target_modules,
        task_type: task_type(fields.get("task_type")).map_err(|reason| field("task_type", reason))?,
        fields,
    })
}

fn peft_type(value: Option<&Json>, path: &Path) -> Result<PeftType> {
    let [tokens, lora] = PeftType::ALL.map(PeftType::as_str);
    let kind = match value {
        Some(Json::String(name)) => PeftType::from_name(name),
        Some(_) => None,
        None => {
            let reason = format!("it is missing; expected {tokens:?} or {lora:?}");
            return Err(Error::field(path, "peft_type", reason));
        }
    };
    let got = value.map(Json::brief).unwrap_or_default();
    kind.ok_or_else(|| Error::Unsupported {
        path: path.to_owned(),
        what: format!("peft_type {got} is not supported; only {tokens:?} and {lora:?} are"),
    })
}

/// A module that is saved whole has no rows of its own to train, as in PEFT.
fn check_modules_to_save(value: Option<&Json>, tokens: &TokenIndices, path: &Path) -> Result<()> {
    let (Some(Json::Array(saved)), TokenIndices::ByModule(modules)) = (value, tokens) else {
        return Ok(());
    };
    let twice = modules.keys().find(|name| saved.contains(&name.as_str().into()));
    match twice {
        None => Ok(()),
        Some(name) => {
            let reason = format!("{name:?} is also in modules_to_save; it trains whole or by rows, not both");
            Err(Error::field(path, PeftType::Lora.tokens_field(), reason))
        }
    }
}

fn target_modules(value: Option<&Json>, kind: PeftType) -> Result<TargetModules, String> {
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
    // LoRA's targets are not those of the rows, and have other rules.
    if kind == PeftType::TrainableTokens {
        target::check(&target)?;
    }
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

//! Which tokens an adapter trains.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::expected;
use super::target::is_path_or_suffix;
use crate::error::{Error, Result};
use crate::json::Json;

/// The ids of the trained tokens, as a config spells them. Their order is that of the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenIndices {
    /// One list: of every targeted module, or with LoRA of the model's input embedding.
    List(Vec<u32>),
    /// A list for each module, by its path or the end of it after a dot; LoRA alone. Without any, no tokens train.
    ByModule(BTreeMap<String, Vec<u32>>),
}

impl TokenIndices {
    /// The ids of the module at `path`, if it has any.
    pub fn of(&self, path: &str) -> Option<&[u32]> {
        match self {
            Self::List(ids) => Some(ids),
            Self::ByModule(_) => self.entries_for(path).next().map(|(_, ids)| ids),
        }
    }

    /// The one list, if all modules have the same.
    pub fn common(&self) -> Option<&[u32]> {
        match self {
            Self::List(ids) => Some(ids),
            Self::ByModule(modules) => {
                let mut lists = modules.values();
                let first = lists.next()?;
                lists.all(|list| list == first).then_some(first)
            }
        }
    }

    /// The entries that name the module at `path`.
    pub(crate) fn entries_for(&self, path: &str) -> impl Iterator<Item = (&str, &[u32])> {
        let modules = match self {
            Self::List(_) => None,
            Self::ByModule(modules) => Some(modules),
        };
        modules
            .into_iter()
            .flatten()
            .filter(move |(name, _)| is_path_or_suffix(name, path))
            .map(|(name, ids)| (name.as_str(), ids.as_slice()))
    }

    /// Every list.
    pub(crate) fn lists(&self) -> impl Iterator<Item = &[u32]> {
        let (one, modules) = match self {
            Self::List(ids) => (Some(ids), None),
            Self::ByModule(modules) => (None, Some(modules.values())),
        };
        one.into_iter()
            .chain(modules.into_iter().flatten())
            .map(Vec::as_slice)
    }

    pub(super) fn to_json(&self) -> Json {
        let list = |ids: &[u32]| Json::Array(ids.iter().map(|id| Json::Number(id.to_string())).collect());
        match self {
            Self::List(ids) => list(ids),
            Self::ByModule(modules) if modules.is_empty() => Json::Null,
            Self::ByModule(modules) => {
                let lists = modules.iter().map(|(name, ids)| (name.clone(), list(ids)));
                Json::Object(lists.collect())
            }
        }
    }
}

/// `token_indices` of a `TrainableTokensConfig`.
pub(super) fn required(value: Option<&Json>, field: &str, path: &Path) -> Result<TokenIndices> {
    match value {
        Some(Json::Array(items)) => Ok(TokenIndices::List(list(items, field, path)?)),
        Some(other) => Err(Error::field(path, field, expected("a list of token ids", other))),
        None => {
            let reason = "it is missing; the rows cannot be told apart without it";
            Err(Error::field(path, field, reason))
        }
    }
}

/// `trainable_token_indices` of a `LoraConfig`.
pub(super) fn of_lora(value: Option<&Json>, field: &str, path: &Path) -> Result<TokenIndices> {
    match value {
        None | Some(Json::Null) => Ok(TokenIndices::ByModule(BTreeMap::new())),
        Some(Json::Array(items)) => Ok(TokenIndices::List(list(items, field, path)?)),
        Some(Json::Object(modules)) => {
            let lists = modules.iter().map(|(name, value)| {
                let field = format!("{field}[{name:?}]");
                match value {
                    _ if name.is_empty() => Err(Error::field(path, field, "the module's name is empty")),
                    Json::Array(items) => Ok((name.clone(), list(items, &field, path)?)),
                    other => Err(Error::field(path, field, expected("a list of token ids", other))),
                }
            });
            Ok(TokenIndices::ByModule(lists.collect::<Result<_>>()?))
        }
        Some(other) => {
            let what = "a list of token ids, one for each module, or null";
            Err(Error::field(path, field, expected(what, other)))
        }
    }
}

/// A list of distinct integers that fit 32 bits, written as integers. Anything that merely converts is refused:
/// PEFT takes `true` for 1 and lets the last of equal ids win.
fn list(items: &[Json], field: &str, path: &Path) -> Result<Vec<u32>> {
    let mut slot_of = HashMap::with_capacity(items.len());
    let mut ids = Vec::with_capacity(items.len());
    for (slot, item) in items.iter().enumerate() {
        let refuse = |reason: String| Error::field(path, format!("{field}[{slot}]"), reason);
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

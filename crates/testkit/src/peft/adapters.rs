//! The adapters of a case.

use std::path::Path;

use serde_json::Value;
use trainable_tokens_core::{TokenRows, TokenSet};
use trainable_tokens_format::Adapter;

use super::fixture::Fixture;
use super::module::Module;
use super::value::{ids, text, texts};
use crate::Failure;
use crate::failure::equal;

/// The tokens and rows of a module in one adapter.
#[derive(Clone, Debug)]
pub(super) struct Trained {
    pub(super) name: String,
    pub(super) tokens: TokenSet,
    /// In the type of the file.
    pub(super) rows: TokenRows,
}

impl Fixture {
    /// What the adapters of an operation have for a module, in their order; nothing if they do not target it.
    ///
    /// An operation names adapters (`active`, `adapters`) or the directory of one (`adapter`); without either it is
    /// about the one in `adapter`.
    pub(super) fn adapters(&self, operation: &Value, module: &Module) -> Result<Vec<Trained>, Failure> {
        let mut found = Vec::new();
        for (name, dir) in chosen(operation)? {
            let adapter = Adapter::read(self.dir().join(dir))?;
            let own = adapter.module(&module.path).or(adapter.module(&module.owner));
            let Some(own) = own else { continue };
            let recorded = recorded_ids(self.json(), Some(&name), own.path())?;
            equal("the adapter's tokens", &own.token_indices().to_vec(), &recorded)?;
            found.push(Trained {
                tokens: own.token_set(module.table.num_rows())?,
                rows: own.rows().clone(),
                name,
            });
        }
        Ok(found)
    }

    /// Whether an operation names adapters, rather than at most one directory.
    pub(super) fn is_about_names(operation: &Value) -> bool {
        operation["active"].is_array() || operation["adapters"].is_array()
    }
}

/// Names and directories of an operation's adapters.
fn chosen(operation: &Value) -> Result<Vec<(String, String)>, Failure> {
    for field in ["active", "adapters"] {
        if operation[field].is_array() {
            let names = texts(operation, field)?.into_iter();
            return Ok(names.map(|name| (name.to_owned(), dir_of(name))).collect());
        }
    }
    let dir = operation["adapter"].as_str().unwrap_or("adapter");
    Ok(vec![("default".to_owned(), dir.to_owned())])
}

/// Where PEFT writes the adapter of this name.
pub(super) fn dir_of(name: &str) -> String {
    Path::new("adapter").join(name).to_string_lossy().into_owned()
}

/// The tokens that `case.json` states for an adapter and a module: one list, a list for each adapter, or a list for
/// each module. Without a name, those of the first adapter.
pub(super) fn recorded_ids(json: &Value, name: Option<&str>, module: &str) -> Result<Vec<u32>, Failure> {
    let stated = [&json["token_indices"], &json["trainable_token_indices"]];
    let stated = stated.into_iter().find(|ids| !ids.is_null());
    let stated = stated.ok_or("it states no tokens")?;
    let Some(lists) = stated.as_object() else {
        return ids(stated);
    };
    let is_adapter = |key: &str| {
        let mut adapters = json["adapters"].as_array().into_iter().flatten();
        adapters.any(|adapter| adapter["dir"] == dir_of(key).as_str())
    };
    let first = match json["adapters"][0]["dir"].as_str() {
        Some(_) => text(&json["adapters"][0], "dir")?.rsplit('/').next(),
        None => None,
    };
    let name = name.or(first).unwrap_or_default();
    let is_end = |key: &str| {
        let head = module.strip_suffix(key);
        head.is_some_and(|head| head.is_empty() || head.ends_with('.'))
    };
    let mut found = lists.iter().filter(|(key, _)| {
        if is_adapter(key) {
            *key == name
        } else {
            is_end(key)
        }
    });
    let (_, list) = found
        .next()
        .ok_or_else(|| format!("it states no tokens of {name} for {module}"))?;
    ids(list)
}

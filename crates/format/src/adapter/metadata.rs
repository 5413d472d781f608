//! What the header of the rows' file says beyond PEFT's format.

mod module;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

pub use module::ModuleMetadata;
use trainable_tokens_core::DType;

use super::{Adapter, AdapterModule};
use crate::config::CONFIG_FILE;
use crate::digest::TableDigest;
use crate::error::{Error, Result, one_line};

const PREFIX: &str = "trainable_tokens.";
const FORMAT_VERSION: &str = "format_version";
const MODULES: &str = "modules";
const CURRENT_VERSION: &str = "1";
const FRAMEWORK: (&str, &str) = ("format", "pt");

/// Facts about an adapter, in the header's `__metadata__` under keys that start with `trainable_tokens.`. PEFT
/// ignores them and files without them are read; where they are present, they must agree with the rest.
///
/// The facts about tables hold for every module that does not say otherwise in [`modules`](Self::modules), but for
/// the digest: it is that of the first module by name.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AdapterMetadata {
    /// Rows of the base table (`V`).
    pub vocab_size: Option<usize>,
    /// Length of a row (`D`).
    pub embedding_dim: Option<usize>,
    /// The ids once more, beside the rows.
    pub token_indices: Option<Vec<u32>>,
    /// The tokens' strings, in slot order.
    pub tokens: Option<Vec<String>>,
    /// Digest of the base table.
    pub base_digest: Option<TableDigest>,
    /// Element type of the base table.
    pub base_dtype: Option<DType>,
    /// How the rows were initialised, such as `keep`.
    pub init: Option<String>,
    /// Release of this library that wrote the file.
    pub library_version: Option<String>,
    /// What differs from module to module, by path.
    pub modules: BTreeMap<String, ModuleMetadata>,
    /// Keys that this release does not know, as they were read.
    other: BTreeMap<String, String>,
}

impl AdapterMetadata {
    /// Metadata with which the file is PEFT's own, byte for byte.
    pub fn none() -> Self {
        Self::default()
    }

    /// A key of the header that this release does not know.
    pub fn other(&self, key: &str) -> Option<&str> {
        self.other.get(key).map(String::as_str)
    }

    pub(super) fn parse(header: Option<&BTreeMap<String, String>>, path: &Path) -> Result<Self> {
        let mut metadata = Self::default();
        for (key, value) in header.into_iter().flatten() {
            let known = match key.strip_prefix(PREFIX) {
                Some(name) => metadata.set(name, value),
                None => Ok(false),
            };
            let known = known.map_err(|reason| Error::field(path, key, reason))?;
            if !known && (key.as_str(), value.as_str()) != FRAMEWORK {
                metadata.other.insert(key.clone(), value.clone());
            }
        }
        Ok(metadata)
    }

    /// Sets the field of a key; `false` if there is none.
    fn set(&mut self, name: &str, value: &str) -> Result<bool, String> {
        match name {
            FORMAT_VERSION if value == CURRENT_VERSION => {}
            FORMAT_VERSION => {
                return Err(format!(
                    "version {value:?} is not known, only {CURRENT_VERSION:?} is; use a newer release"
                ));
            }
            "vocab_size" => self.vocab_size = Some(number(value)?),
            "embedding_dim" => self.embedding_dim = Some(number(value)?),
            "token_indices" => self.token_indices = Some(list(value, "token ids")?),
            "tokens" => self.tokens = Some(list(value, "strings")?),
            "base_digest" => self.base_digest = Some(value.parse().map_err(one_line)?),
            "base_dtype" => self.base_dtype = Some(module::dtype(value)?),
            "init" => self.init = Some(value.to_owned()),
            "library_version" => self.library_version = Some(value.to_owned()),
            MODULES => self.modules = module::parse(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The header's `__metadata__`.
    pub(super) fn to_header(&self) -> BTreeMap<String, String> {
        let fields = [
            ("vocab_size", text(self.vocab_size.as_ref())),
            ("embedding_dim", text(self.embedding_dim.as_ref())),
            ("token_indices", self.token_indices.as_ref().map(json)),
            ("tokens", self.tokens.as_ref().map(json)),
            ("base_digest", text(self.base_digest.as_ref())),
            ("base_dtype", text(self.base_dtype.as_ref())),
            ("init", self.init.clone()),
            ("library_version", self.library_version.clone()),
            (MODULES, module::to_json(&self.modules)),
        ];
        let mut header = self.other.clone();
        header.extend(
            fields
                .into_iter()
                .filter_map(|(name, value)| Some((format!("{PREFIX}{name}"), value?))),
        );
        if header.keys().any(|key| key.starts_with(PREFIX)) {
            header.insert(format!("{PREFIX}{FORMAT_VERSION}"), CURRENT_VERSION.to_owned());
        }
        let (key, value) = FRAMEWORK;
        header.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        header
    }

    /// The facts of the module at `path`. The digest of all is that of the first alone.
    pub(super) fn of(&self, path: &str, is_first: bool) -> ModuleMetadata {
        let mut facts = self.modules.get(path).cloned().unwrap_or_default();
        facts.vocab_size = facts.vocab_size.or(self.vocab_size);
        facts.embedding_dim = facts.embedding_dim.or(self.embedding_dim);
        facts.token_indices = facts.token_indices.or_else(|| self.token_indices.clone());
        facts.tokens = facts.tokens.or_else(|| self.tokens.clone());
        facts.base_digest = facts.base_digest.or(self.base_digest.filter(|_| is_first));
        facts.base_dtype = facts.base_dtype.or(self.base_dtype);
        facts
    }

    /// Puts the facts of modules, the first by name first, where they belong: what all share in one place.
    pub(super) fn set_modules(&mut self, mut modules: Vec<(String, ModuleMetadata)>) {
        self.vocab_size = common(&mut modules, |facts| &mut facts.vocab_size);
        self.embedding_dim = common(&mut modules, |facts| &mut facts.embedding_dim);
        self.token_indices = common(&mut modules, |facts| &mut facts.token_indices);
        self.tokens = common(&mut modules, |facts| &mut facts.tokens);
        self.base_dtype = common(&mut modules, |facts| &mut facts.base_dtype);
        self.base_digest = modules
            .first_mut()
            .and_then(|(_, facts)| facts.base_digest.take());
        modules.retain(|(_, facts)| *facts != ModuleMetadata::default());
        self.modules = modules.into_iter().collect();
    }

    /// Checks the facts that the config and the rows also state.
    pub(super) fn check(&self, adapter: &Adapter) -> Result<()> {
        let strangers = self
            .modules
            .keys()
            .find(|path| !adapter.modules.iter().any(|module| module.path == **path));
        if let Some(path) = strangers {
            return Err(Error::Metadata {
                path: adapter.origin.clone(),
                key: format!("{PREFIX}{MODULES}[{path:?}]"),
                metadata: "there is such a module".to_owned(),
                other: "the file has no rows of its own for it".to_owned(),
            });
        }
        adapter
            .modules
            .iter()
            .try_for_each(|module| self.check_module(adapter, module))
    }

    fn check_module(&self, adapter: &Adapter, module: &AdapterModule) -> Result<()> {
        let own = self.modules.get(&module.path);
        let facts = self.of(&module.path, false);
        let differ = |name: &str, is_own: bool, metadata: String, other: String| {
            let key = if is_own {
                format!("{MODULES}[{:?}].{name}", module.path)
            } else {
                name.to_owned()
            };
            Err(Error::Metadata {
                path: adapter.origin.clone(),
                key: format!("{PREFIX}{key}"),
                metadata,
                other,
            })
        };
        let ids = &module.token_indices;
        if let Some(recorded) = &facts.token_indices
            && recorded != ids
        {
            let field = adapter.config.peft_type().tokens_field();
            let other = format!("{field} in {CONFIG_FILE} is {}", brief(ids));
            let is_own = own.is_some_and(|own| own.token_indices.is_some());
            return differ("token_indices", is_own, brief(recorded), other);
        }
        let columns = module.rows.embedding_dim();
        if let Some(recorded) = facts.embedding_dim
            && recorded != columns
        {
            let is_own = own.is_some_and(|own| own.embedding_dim.is_some());
            return differ(
                "embedding_dim",
                is_own,
                recorded.to_string(),
                format!("rows have {columns} columns"),
            );
        }
        if let Some(tokens) = &facts.tokens
            && tokens.len() != ids.len()
        {
            let is_own = own.is_some_and(|own| own.tokens.is_some());
            let (have, rows) = (tokens.len(), ids.len());
            return differ(
                "tokens",
                is_own,
                format!("{have} tokens"),
                format!("there are {rows} rows"),
            );
        }
        if let Some(vocab_size) = facts.vocab_size
            && let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size)
        {
            let is_own = own.is_some_and(|own| own.vocab_size.is_some());
            return differ(
                "vocab_size",
                is_own,
                vocab_size.to_string(),
                format!("token id {id} is trained"),
            );
        }
        Ok(())
    }
}

/// Takes a fact out of the modules if all have the same.
fn common<T: Clone + PartialEq>(
    modules: &mut [(String, ModuleMetadata)],
    fact: impl Fn(&mut ModuleMetadata) -> &mut Option<T>,
) -> Option<T> {
    let shared = fact(&mut modules.first_mut()?.1).clone()?;
    let same = modules
        .iter_mut()
        .all(|(_, facts)| fact(facts).as_ref() == Some(&shared));
    if !same {
        return None;
    }
    for (_, facts) in modules {
        *fact(facts) = None;
    }
    Some(shared)
}

fn text(value: Option<&impl Display>) -> Option<String> {
    value.map(ToString::to_string)
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn number(value: &str) -> Result<usize, String> {
    // Digits alone: Rust would take a plus sign too.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| value.parse().ok()).flatten();
    number.ok_or_else(|| format!("expected a number of rows or columns, got {value:?}"))
}

fn list<T: serde::de::DeserializeOwned>(value: &str, what: &str) -> Result<Vec<T>, String> {
    serde_json::from_str(value)
        .map_err(|error| format!("expected a JSON list of {what}: {}", one_line(error)))
}

/// A list for a message: whole if it is short.
fn brief(ids: &[u32]) -> String {
    const LONGEST: usize = 8;
    match ids.get(..LONGEST) {
        Some(head) if ids.len() > LONGEST => format!("{head:?} and {} more", ids.len() - LONGEST),
        _ => format!("{ids:?}"),
    }
}

//! What the header of the rows' file says beyond PEFT's format.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use trainable_tokens_core::DType;

use crate::digest::TableDigest;
use crate::error::{Error, Result, one_line};

const PREFIX: &str = "trainable_tokens.";
const FORMAT_VERSION: &str = "format_version";
const CURRENT_VERSION: &str = "1";
const FRAMEWORK: (&str, &str) = ("format", "pt");

/// Facts about an adapter, in the header's `__metadata__` under keys that start with `trainable_tokens.`. PEFT
/// ignores them and files without them are read; where they are present, they must agree with the rest.
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
            "base_dtype" => self.base_dtype = Some(dtype(value)?),
            "init" => self.init = Some(value.to_owned()),
            "library_version" => self.library_version = Some(value.to_owned()),
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

    /// Checks the facts that the config and the rows also state.
    pub(super) fn check(&self, path: &Path, token_indices: &[u32], embedding_dims: &[usize]) -> Result<()> {
        let differ = |name: &str, metadata: String, other: String| {
            Err(Error::Metadata {
                path: path.to_owned(),
                key: format!("{PREFIX}{name}"),
                metadata,
                other,
            })
        };
        if let Some(ids) = &self.token_indices
            && ids != token_indices
        {
            let (have, other) = (brief(ids), brief(token_indices));
            return differ(
                "token_indices",
                have,
                format!("token_indices in adapter_config.json is {other}"),
            );
        }
        if let Some(dim) = self.embedding_dim
            && let Some(other) = embedding_dims.iter().find(|other| **other != dim)
        {
            return differ(
                "embedding_dim",
                dim.to_string(),
                format!("rows have {other} columns"),
            );
        }
        if let Some(tokens) = &self.tokens
            && tokens.len() != token_indices.len()
        {
            let (have, other) = (tokens.len(), token_indices.len());
            return differ(
                "tokens",
                format!("{have} tokens"),
                format!("there are {other} rows"),
            );
        }
        if let Some(vocab_size) = self.vocab_size
            && let Some(id) = token_indices.iter().find(|id| **id as usize >= vocab_size)
        {
            return differ(
                "vocab_size",
                vocab_size.to_string(),
                format!("token id {id} is trained"),
            );
        }
        Ok(())
    }
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

fn dtype(value: &str) -> Result<DType, String> {
    [DType::F64, DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .find(|dtype| dtype.to_string() == value)
        .ok_or_else(|| format!("expected F64, F32, F16 or BF16, got {value:?}"))
}

/// A list for a message: whole if it is short.
fn brief(ids: &[u32]) -> String {
    const LONGEST: usize = 8;
    match ids.get(..LONGEST) {
        Some(head) if ids.len() > LONGEST => format!("{head:?} and {} more", ids.len() - LONGEST),
        _ => format!("{ids:?}"),
    }
}

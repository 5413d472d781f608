//! Facts about one module of several.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use trainable_tokens_core::DType;

use crate::digest::TableDigest;
use crate::json::Json;

/// Facts about the table of one module. Where one is absent, that of all modules holds.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ModuleMetadata {
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
    /// Facts that this release does not know, as they were read.
    other: Map<String, Value>,
}

/// The facts of all modules: a JSON object by path; `None` without any.
pub(super) fn to_json(modules: &BTreeMap<String, ModuleMetadata>) -> Option<String> {
    let modules = modules
        .iter()
        .map(|(path, facts)| (path.clone(), facts.to_value()));
    let modules: Map<_, _> = modules.collect();
    (!modules.is_empty()).then(|| Value::Object(modules).to_string())
}

pub(super) fn parse(text: &str) -> Result<BTreeMap<String, ModuleMetadata>, String> {
    // Strict about keys that occur twice, as all JSON here.
    let Value::Object(modules) = Json::parse(text)?.to_value() else {
        return Err("expected a JSON object of facts by module".to_owned());
    };
    let modules = modules.into_iter().map(|(path, facts)| {
        let facts = ModuleMetadata::from_value(facts).map_err(|reason| format!("{path:?}: {reason}"))?;
        Ok((path, facts))
    });
    modules.collect()
}

impl ModuleMetadata {
    fn to_value(&self) -> Value {
        let mut facts = self.other.clone();
        let known = [
            ("vocab_size", self.vocab_size.map(Value::from)),
            ("embedding_dim", self.embedding_dim.map(Value::from)),
            ("token_indices", self.token_indices.clone().map(Value::from)),
            ("tokens", self.tokens.clone().map(Value::from)),
            (
                "base_digest",
                self.base_digest.map(|digest| digest.to_string().into()),
            ),
            (
                "base_dtype",
                self.base_dtype.map(|dtype| dtype.to_string().into()),
            ),
        ];
        let known = known
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)));
        facts.extend(known);
        Value::Object(facts)
    }

    fn from_value(value: Value) -> Result<Self, String> {
        let Value::Object(facts) = value else {
            return Err("expected an object of facts".to_owned());
        };
        let mut module = Self::default();
        for (name, value) in facts {
            module
                .set(&name, value)
                .map_err(|reason| format!("{name}: {reason}"))?;
        }
        Ok(module)
    }

    fn set(&mut self, name: &str, value: Value) -> Result<(), String> {
        match name {
            "vocab_size" => self.vocab_size = Some(read(value, "a number of rows")?),
            "embedding_dim" => self.embedding_dim = Some(read(value, "a number of columns")?),
            "token_indices" => self.token_indices = Some(read(value, "a list of token ids")?),
            "tokens" => self.tokens = Some(read(value, "a list of strings")?),
            "base_digest" => {
                let text: String = read(value, "a digest")?;
                self.base_digest = Some(text.parse().map_err(crate::error::one_line)?);
            }
            "base_dtype" => self.base_dtype = Some(dtype(&read::<String>(value, "an element type")?)?),
            _ => {
                self.other.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value, what: &str) -> Result<T, String> {
    serde_json::from_value(value)
        .map_err(|error| format!("expected {what}: {}", crate::error::one_line(error)))
}

/// The element type of this name.
pub(super) fn dtype(value: &str) -> Result<DType, String> {
    [DType::F64, DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .find(|dtype| dtype.to_string() == value)
        .ok_or_else(|| format!("expected F64, F32, F16 or BF16, got {value:?}"))
}

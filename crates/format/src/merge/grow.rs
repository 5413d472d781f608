//! What else changes when tables grow.

use std::fs;
use std::path::Path;

use super::plan::Plan;
use crate::checkpoint::{Checkpoint, INDEX_FILE, MAX_INDEX_BYTES, MODEL_CONFIG_FILE};
use crate::error::{Error, Result};
use crate::json::{Json, MAX_CONFIG_BYTES, read_text};
use crate::model::ModelTables;

/// Writes the new sizes into the copy of `config.json` and of the index.
pub(super) fn adjust(base: &Checkpoint, plan: &Plan<'_>, dir: &Path) -> Result<()> {
    let grown = plan.grown();
    if grown.is_empty() {
        return Ok(());
    }
    let model = ModelTables::of(base)?;
    let embedding = model.input_embedding().and_then(|path| base.stored_weight(path));
    if let Some([_, rows]) = embedding.and_then(|tensor| grown.get(tensor).copied()) {
        edit(&dir.join(MODEL_CONFIG_FILE), MAX_CONFIG_BYTES, |config| {
            // Models of several parts keep the language model's fields apart.
            let apart = !matches!(config.get("vocab_size"), Some(Json::Number(_)));
            match config.get_mut("text_config") {
                Some(Json::Object(text)) if apart => {
                    text.insert("vocab_size".to_owned(), Json::Number(rows.to_string()))
                }
                _ => config.insert("vocab_size".to_owned(), Json::Number(rows.to_string())),
            };
        })?;
    }
    edit(&dir.join(INDEX_FILE), MAX_INDEX_BYTES, |index| {
        if let Some(Json::Object(metadata)) = index.get_mut("metadata") {
            add(metadata, "total_size", plan.added_bytes());
            add(metadata, "total_parameters", plan.added_elements());
        }
    })
}

type Fields = std::collections::BTreeMap<String, Json>;

/// Adds to a field, if it is there and a whole number.
fn add(fields: &mut Fields, name: &str, more: usize) {
    if let Some(Json::Number(text)) = fields.get_mut(name)
        && let Ok(number) = text.parse::<u64>()
    {
        *text = (number + more as u64).to_string();
    }
}

/// Rewrites a file of JSON as transformers spells it, if it is there.
fn edit(path: &Path, limit: u64, change: impl FnOnce(&mut Fields)) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let json = |reason: String| Error::Json {
        path: path.to_owned(),
        reason,
    };
    let Json::Object(mut fields) = Json::parse(&read_text(path, limit)?).map_err(json)? else {
        return Err(json("expected an object".to_owned()));
    };
    change(&mut fields);
    let text = Json::Object(fields).to_python() + "\n";
    fs::write(path, text).map_err(Error::io("write", path))
}

//! `adapter_config.json` of PEFT's `TrainableTokensConfig`.

mod parse;
mod target;
mod task_type;

use std::collections::BTreeMap;
use std::path::Path;

pub use target::TargetModules;
pub use task_type::TaskType;

use crate::error::{Error, Result};
use crate::json::{Json, MAX_CONFIG_BYTES, read_text, text_of};

/// The file's name in an adapter directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// The one kind of adapter that is read.
pub(crate) const PEFT_TYPE: &str = "TRAINABLE_TOKENS";
/// The release of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// The config of a trainable-tokens adapter: the fields that this library knows, checked, and every other field
/// as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    fields: BTreeMap<String, Json>,
    token_indices: Vec<u32>,
    target_modules: TargetModules,
    task_type: Option<TaskType>,
}

impl AdapterConfig {
    /// A config as PEFT writes it, with `task_type` [`TaskType::CausalLm`].
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if an id is given twice, or `target_modules` names nothing.
    pub fn new(token_indices: &[u32], target_modules: &TargetModules) -> Result<Self> {
        let ids = token_indices.iter().map(|id| Json::Number(id.to_string()));
        let fields = [
            ("auto_mapping", Json::Null),
            ("base_model_name_or_path", Json::Null),
            ("inference_mode", Json::Bool(true)),
            ("init_weights", Json::Bool(true)),
            ("peft_type", PEFT_TYPE.into()),
            ("peft_version", PEFT_VERSION.into()),
            ("revision", Json::Null),
            ("target_modules", target_modules.to_json()),
            ("task_type", TaskType::CausalLm.as_str().into()),
            ("token_indices", Json::Array(ids.collect())),
        ];
        let fields = fields.map(|(name, value)| (name.to_owned(), value));
        parse::config(fields.into(), Path::new(CONFIG_FILE))
    }

    /// Reads `adapter_config.json` at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::Io`], and those of [`from_json`](Self::from_json).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            let path = path.to_owned();
            let hint = "an adapter directory holds it beside adapter_model.safetensors";
            return Err(Error::NotFound { path, hint });
        }
        parse::text(&read_text(path, MAX_CONFIG_BYTES)?, path)
    }

    /// Parses the bytes of an `adapter_config.json`; `path` names it in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if it is not strict JSON (a byte order mark, `NaN` and repeated keys are refused),
    /// [`Error::Field`] for a wrong field, [`Error::Unsupported`] for another kind of adapter.
    pub fn from_json(bytes: &[u8], path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        parse::text(&text_of(bytes.to_vec(), path, MAX_CONFIG_BYTES)?, path)
    }

    /// The file's text, as Python's `json.dump` spells it: a file written by PEFT gives the same bytes again.
    pub fn to_json(&self) -> String {
        Json::Object(self.fields.clone()).to_python()
    }

    /// The ids of the trained tokens, in slot order.
    pub fn token_indices(&self) -> &[u32] {
        &self.token_indices
    }

    /// Which modules the rows belong to.
    pub fn target_modules(&self) -> &TargetModules {
        &self.target_modules
    }

    /// The task, if one is given.
    pub fn task_type(&self) -> Option<TaskType> {
        self.task_type
    }

    /// Whether rows started as copies of the base's; PEFT's default if absent.
    pub fn init_weights(&self) -> bool {
        self.fields.get("init_weights") != Some(&Json::Bool(false))
    }

    /// Whether the adapter was saved for inference; files by PEFT always say so.
    pub fn inference_mode(&self) -> bool {
        self.fields.get("inference_mode") == Some(&Json::Bool(true))
    }

    /// Always `TRAINABLE_TOKENS`.
    pub fn peft_type(&self) -> &'static str {
        PEFT_TYPE
    }

    /// The release of PEFT that wrote the file.
    pub fn peft_version(&self) -> Option<&str> {
        self.text("peft_version")
    }

    /// The base model.
    pub fn base_model_name_or_path(&self) -> Option<&str> {
        self.text("base_model_name_or_path")
    }

    /// The revision of the base model.
    pub fn revision(&self) -> Option<&str> {
        self.text("revision")
    }

    /// The class of the base model, which PEFT writes when no task type is given.
    pub fn auto_mapping(&self) -> Option<serde_json::Value> {
        self.field("auto_mapping").filter(|value| !value.is_null())
    }

    /// Any field, known or not.
    pub fn field(&self, name: &str) -> Option<serde_json::Value> {
        self.fields.get(name).map(Json::to_value)
    }

    /// Sets any field.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] or [`Error::Unsupported`] if the field is known and the value is wrong.
    pub fn with_field(&self, name: impl Into<String>, value: &serde_json::Value) -> Result<Self> {
        let path = Path::new(CONFIG_FILE);
        let name = name.into();
        let value =
            Json::parse(&value.to_string()).map_err(|reason| Error::field(path, name.clone(), reason))?;
        let mut fields = self.fields.clone();
        fields.insert(name, value);
        parse::config(fields, path)
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.fields.get(name) {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }
    }
}

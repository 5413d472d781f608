//! `adapter_config.json` of PEFT's `TrainableTokensConfig`, and of its `LoraConfig` with token ids.

mod defaults;
mod parse;
mod peft_type;
mod target;
mod task_type;
mod tokens;

use std::collections::BTreeMap;
use std::path::Path;

pub use peft_type::PeftType;
pub(crate) use target::Matcher;
pub use target::TargetModules;
pub use target::is_path_or_suffix;
pub use task_type::TaskType;
pub use tokens::TokenIndices;

use crate::error::{Error, Result};
use crate::json::{Json, MAX_CONFIG_BYTES, read_text, text_of};

/// The file's name in an adapter directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";

/// The config of a trainable-tokens adapter: the fields that this library knows, checked, and every other field
/// as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    fields: BTreeMap<String, Json>,
    kind: PeftType,
    token_indices: TokenIndices,
    target_modules: TargetModules,
    task_type: Option<TaskType>,
}

impl AdapterConfig {
    /// A `TrainableTokensConfig` as PEFT writes it, with `task_type` [`TaskType::CausalLm`].
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if an id is given twice, or `target_modules` names nothing.
    pub fn new(token_indices: &[u32], target_modules: &TargetModules) -> Result<Self> {
        let mut fields = defaults::fields(PeftType::TrainableTokens);
        let ids = TokenIndices::List(token_indices.to_vec());
        fields.insert("token_indices".to_owned(), ids.to_json());
        fields.insert("target_modules".to_owned(), target_modules.to_json());
        fields.insert("task_type".to_owned(), TaskType::CausalLm.as_str().into());
        parse::config(fields, Path::new(CONFIG_FILE))
    }

    /// A `LoraConfig` as PEFT writes it, with the given ids and else with PEFT's defaults (`r` and `lora_alpha` 8, no
    /// target modules), and `task_type` [`TaskType::CausalLm`]. [`with_field`](Self::with_field) sets the others.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if an id is given twice for one module, or a module's name is empty.
    pub fn lora(token_indices: &TokenIndices) -> Result<Self> {
        let mut fields = defaults::fields(PeftType::Lora);
        fields.insert("trainable_token_indices".to_owned(), token_indices.to_json());
        fields.insert("task_type".to_owned(), TaskType::CausalLm.as_str().into());
        parse::config(fields, Path::new(CONFIG_FILE))
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

    /// The kind of adapter.
    pub fn peft_type(&self) -> PeftType {
        self.kind
    }

    /// The ids of the trained tokens: `token_indices`, with LoRA `trainable_token_indices`.
    pub fn token_indices(&self) -> &TokenIndices {
        &self.token_indices
    }

    /// The modules that are targeted: those of the rows, but with LoRA those of its own weights.
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

    /// Whether tied modules of several token lists must have the same one (LoRA).
    pub fn ensure_weight_tying(&self) -> bool {
        self.fields.get("ensure_weight_tying") == Some(&Json::Bool(true))
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
        let value = Json::from_value(value).map_err(|reason| Error::field(path, name.clone(), reason))?;
        let mut fields = self.fields.clone();
        fields.insert(name, value);
        parse::config(fields, path)
    }

    /// Sets the token ids.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if an id is given twice for one module, if a module's name is empty, or if ids by module are
    /// given to a kind of adapter that has one list.
    pub fn with_token_indices(&self, token_indices: &TokenIndices) -> Result<Self> {
        let mut fields = self.fields.clone();
        fields.insert(self.kind.tokens_field().to_owned(), token_indices.to_json());
        parse::config(fields, Path::new(CONFIG_FILE))
    }

    /// Sets `target_modules`.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it names nothing.
    pub fn with_target_modules(&self, target: &TargetModules) -> Result<Self> {
        let mut fields = self.fields.clone();
        fields.insert("target_modules".to_owned(), target.to_json());
        parse::config(fields, Path::new(CONFIG_FILE))
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.fields.get(name) {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }
    }
}

fn expected(what: &str, got: &Json) -> String {
    format!("expected {what}, got {}", got.brief())
}

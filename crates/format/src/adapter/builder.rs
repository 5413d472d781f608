//! Making a new adapter.

use std::path::PathBuf;

use trainable_tokens_core::{DType, TokenRows, TokenSet};

use super::metadata::AdapterMetadata;
use super::{Adapter, AdapterModule, ROWS_FILE};
use crate::config::{AdapterConfig, TargetModules, TaskType};
use crate::digest::TableDigest;
use crate::error::{Error, Result};

/// Collects what an adapter needs; [`build`](Self::build) checks it. Made by [`Adapter::builder`].
#[derive(Clone, Debug)]
pub struct AdapterBuilder {
    token_indices: Vec<u32>,
    modules: Vec<AdapterModule>,
    target_modules: Option<TargetModules>,
    task_type: Option<TaskType>,
    base_model: Option<String>,
    init_weights: bool,
    metadata: AdapterMetadata,
}

impl AdapterBuilder {
    pub(super) fn new(path: String, tokens: &TokenSet, rows: TokenRows) -> Self {
        let mut metadata = AdapterMetadata::none();
        metadata.vocab_size = Some(tokens.vocab_size());
        metadata.embedding_dim = Some(rows.embedding_dim());
        metadata.token_indices = Some(tokens.to_vec());
        metadata.library_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        let module = AdapterModule {
            path,
            tied_paths: Vec::new(),
            rows,
        };
        Self {
            token_indices: tokens.to_vec(),
            modules: vec![module],
            target_modules: None,
            task_type: Some(TaskType::CausalLm),
            base_model: None,
            init_weights: true,
            metadata,
        }
    }

    /// Adds a module that shares the table of the last one, such as `lm_head`: the file gets a copy of the rows
    /// for it, without which PEFT warns of a missing key.
    pub fn tied(mut self, path: impl Into<String>) -> Self {
        if let Some(module) = self.modules.last_mut() {
            module.tied_paths.push(path.into());
        }
        self
    }

    /// Adds another targeted module with rows of its own, for the same tokens.
    pub fn module(mut self, path: impl Into<String>, rows: TokenRows) -> Self {
        self.modules.push(AdapterModule {
            path: path.into(),
            tied_paths: Vec::new(),
            rows,
        });
        self
    }

    /// `target_modules` of the config. By default, the last part of each module's path (`embed_tokens`).
    pub fn target_modules(mut self, target: impl Into<TargetModules>) -> Self {
        self.target_modules = Some(target.into());
        self
    }

    /// `task_type` of the config; [`TaskType::CausalLm`] by default.
    pub fn task_type(mut self, task: Option<TaskType>) -> Self {
        self.task_type = task;
        self
    }

    /// `base_model_name_or_path` of the config; `null` by default.
    pub fn base_model_name_or_path(mut self, name: impl Into<String>) -> Self {
        self.base_model = Some(name.into());
        self
    }

    /// `init_weights` of the config: whether rows started as copies of the base's; true by default.
    pub fn init_weights(mut self, keep: bool) -> Self {
        self.init_weights = keep;
        self
    }

    /// The tokens' strings, in slot order, for the metadata.
    pub fn tokens(mut self, tokens: Vec<String>) -> Self {
        self.metadata.tokens = Some(tokens);
        self
    }

    /// What the base table was, for the metadata; of several targeted modules, that of the first by name.
    pub fn base(mut self, digest: TableDigest, dtype: DType) -> Self {
        self.metadata.base_digest = Some(digest);
        self.metadata.base_dtype = Some(dtype);
        self
    }

    /// How the rows were initialised, for the metadata.
    pub fn init(mut self, how: impl Into<String>) -> Self {
        self.metadata.init = Some(how.into());
        self
    }

    /// Leaves all metadata out: the file is PEFT's own, byte for byte.
    pub fn without_metadata(mut self) -> Self {
        self.metadata = AdapterMetadata::none();
        self
    }

    /// Checks and makes the adapter.
    ///
    /// # Errors
    ///
    /// [`Error::TensorShape`] if rows are not `[k, D]`, [`Error::Metadata`] if the metadata do not fit,
    /// [`Error::Field`] if `target_modules` does not fit the modules, or a path occurs twice.
    pub fn build(self) -> Result<Adapter> {
        let target = self.target_modules.unwrap_or_else(|| {
            let mut names = Vec::new();
            for name in self.modules.iter().map(|module| last_part(&module.path)) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            TargetModules::List(names)
        });
        check_paths(&self.modules, &target)?;
        let task = serde_json::json!(self.task_type.map(TaskType::as_str));
        let config = AdapterConfig::new(&self.token_indices, &target)?
            .with_field("task_type", &task)?
            .with_field("base_model_name_or_path", &self.base_model.into())?
            .with_field("init_weights", &self.init_weights.into())?;
        let mut metadata = self.metadata;
        let mut dims = self.modules.iter().map(|module| module.rows.embedding_dim());
        if dims.any(|dim| Some(dim) != metadata.embedding_dim) {
            // Rows of several lengths: none of them is the adapter's.
            metadata.embedding_dim = None;
        }
        let adapter = Adapter {
            config,
            modules: self.modules,
            metadata,
            extra: Vec::new(),
            origin: PathBuf::from(ROWS_FILE),
        };
        adapter.checked()
    }
}

fn last_part(path: &str) -> String {
    path.rsplit('.').next().unwrap_or(path).to_owned()
}

/// Every module must be targeted, and no path may occur twice: else the file would be read as something else.
fn check_paths(modules: &[AdapterModule], target: &TargetModules) -> Result<()> {
    let path = PathBuf::from(ROWS_FILE);
    let refuse = |reason: String| Error::field(&path, "target_modules", reason);
    let mut seen = Vec::new();
    for module in modules {
        for at in module.all_paths() {
            if seen.contains(&at) {
                return Err(refuse(format!("module {at:?} is given twice")));
            }
            seen.push(at);
        }
        if !target.matches(&module.path).map_err(refuse)? {
            return Err(refuse(format!("module {:?} is not among them", module.path)));
        }
    }
    Ok(())
}

//! Making a new adapter.

mod config;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use config::check_paths;
use safetensors::Dtype;
use trainable_tokens_core::{DType, EmbeddingSource, TokenId, TokenRows, TokenSet};

use super::key::{self, Key, Layer, key_of, layer_key};
use super::metadata::{AdapterMetadata, ModuleMetadata};
use super::{Adapter, AdapterModule, ExtraTensor, ROWS_FILE};
use crate::config::{AdapterConfig, PeftType, TargetModules, TaskType};
use crate::digest::TableDigest;
use crate::error::{Error, Result};
use crate::file::SafetensorsFile;
use crate::header::{TensorData, write_safetensors};
use crate::lora::Factor;
use crate::table::file_dtype;

/// Collects what an adapter needs; [`build`](Self::build) checks it. Made by [`Adapter::builder`].
#[derive(Clone, Debug)]
pub struct AdapterBuilder {
    modules: Vec<(AdapterModule, ModuleMetadata)>,
    lora: Option<AdapterConfig>,
    target_modules: Option<TargetModules>,
    /// The field's value, if it was given.
    task_type: Option<serde_json::Value>,
    base_model: Option<String>,
    init_weights: Option<bool>,
    extra: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    layers: Vec<(String, Layer, TokenRows)>,
    init: Option<String>,
    metadata: bool,
}

impl AdapterBuilder {
    pub(super) fn new(path: String, tokens: &TokenSet, rows: TokenRows) -> Self {
        let builder = Self {
            modules: Vec::new(),
            lora: None,
            target_modules: None,
            task_type: None,
            base_model: None,
            init_weights: None,
            extra: Vec::new(),
            layers: Vec::new(),
            init: None,
            metadata: true,
        };
        builder.module_of(path, tokens, rows)
    }

    /// Adds a module that shares the table of the last one, such as `lm_head`: the file gets a copy of the rows
    /// for it, without which PEFT warns of a missing key. With LoRA it gets none, for PEFT expects none.
    pub fn tied(mut self, path: impl Into<String>) -> Self {
        if let Some((module, _)) = self.modules.last_mut() {
            module.tied_paths.push(path.into());
        }
        self
    }

    /// Adds another targeted module with rows of its own, for the same tokens as the last one.
    pub fn module(mut self, path: impl Into<String>, rows: TokenRows) -> Self {
        if let Some((last, facts)) = self.modules.last() {
            let module = AdapterModule {
                path: path.into(),
                tied_paths: Vec::new(),
                token_indices: last.token_indices.clone(),
                rows,
            };
            let mut facts = facts.clone();
            facts.embedding_dim = Some(module.rows.embedding_dim());
            facts.base_digest = None;
            facts.base_dtype = None;
            self.modules.push((module, facts));
        }
        self
    }

    /// Adds another targeted module with rows of its own, for tokens of its own. Only LoRA's config can tell several
    /// sets of tokens.
    pub fn module_of(mut self, path: impl Into<String>, tokens: &TokenSet, rows: TokenRows) -> Self {
        let mut facts = ModuleMetadata::default();
        facts.vocab_size = Some(tokens.vocab_size());
        facts.embedding_dim = Some(rows.embedding_dim());
        facts.token_indices = Some(tokens.to_vec());
        let module = AdapterModule {
            path: path.into(),
            tied_paths: Vec::new(),
            token_indices: tokens.to_vec(),
            rows,
        };
        self.modules.push((module, facts));
        self
    }

    /// Makes it a LoRA adapter with this config, such as one by [`AdapterConfig::lora`]. If the config has no token
    /// ids, it gets them: for one module a list, for several a list for each, by the last part of its path.
    pub fn lora(mut self, config: AdapterConfig) -> Self {
        self.lora = Some(config);
        self
    }

    /// Adds a tensor that is no rows, such as LoRA's weights: its name in the file, its shape, and its little-endian
    /// elements in row-major order.
    pub fn extra_tensor(
        mut self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: impl Into<Vec<usize>>,
        bytes: Vec<u8>,
    ) -> Self {
        self.extra.push((name.into(), dtype, shape.into(), bytes));
        self
    }

    /// Adds LoRA's weights of the linear layer at `path`: `A` `[r, in]` and `B` `[out, r]`.
    pub fn lora_linear(self, path: &str, a: &TokenRows, b: &TokenRows) -> Self {
        let factors = [(Factor::LinearA, a), (Factor::LinearB, b)];
        factors.into_iter().fold(self, |builder, (factor, values)| {
            let dtype = file_dtype(values.dtype());
            builder.extra_tensor(factor.key(path), dtype, values.shape(), values.to_le_bytes())
        })
    }

    /// Stores the whole table of the last module beside its rows, and for each module that is tied to it, as PEFT does
    /// with `save_embedding_layers`; see [`SaveEmbeddingLayers`](crate::SaveEmbeddingLayers). It is read into memory.
    ///
    /// # Errors
    ///
    /// Those of reading the table's rows.
    pub fn embedding_layer<S: EmbeddingSource>(mut self, table: &S) -> Result<Self, S::Error> {
        let rows = whole(table)?;
        if let Some((module, _)) = self.modules.last() {
            let paths = module.all_paths().map(str::to_owned);
            self.layers
                .extend(paths.map(|path| (path, Layer::UnderRows, rows.clone())));
        }
        Ok(self)
    }

    /// Stores the whole table of a module without rows, such as an untied head of a model whose vocabulary has grown;
    /// PEFT loads it, but may leave it out itself.
    ///
    /// # Errors
    ///
    /// Those of reading the table's rows.
    pub fn head_layer<S: EmbeddingSource>(
        mut self,
        path: impl Into<String>,
        table: &S,
    ) -> Result<Self, S::Error> {
        self.layers.push((path.into(), Layer::Plain, whole(table)?));
        Ok(self)
    }

    /// `target_modules` of the config. By default, the last part of each module's path (`embed_tokens`); with LoRA,
    /// those of its config.
    pub fn target_modules(mut self, target: impl Into<TargetModules>) -> Self {
        self.target_modules = Some(target.into());
        self
    }

    /// `task_type` of the config; [`TaskType::CausalLm`] by default, with LoRA that of its config. For a model that does
    /// not generate text, PEFT wants another one, or none.
    pub fn task_type(mut self, task: Option<TaskType>) -> Self {
        self.task_type = Some(task.map(TaskType::as_str).into());
        self
    }

    /// `base_model_name_or_path` of the config; `null` by default, with LoRA that of its config.
    pub fn base_model_name_or_path(mut self, name: impl Into<String>) -> Self {
        self.base_model = Some(name.into());
        self
    }

    /// `init_weights` of the config: whether rows started as copies of the base's; true by default. LoRA's config has
    /// no such field.
    pub fn init_weights(mut self, keep: bool) -> Self {
        self.init_weights = Some(keep);
        self
    }

    /// The strings of the last module's tokens, in slot order, for the metadata; modules with the same tokens share
    /// them.
    pub fn tokens(mut self, tokens: Vec<String>) -> Self {
        if let Some(((last, facts), others)) = self.modules.split_last_mut() {
            let same = others
                .iter_mut()
                .filter(|(module, _)| module.token_indices == last.token_indices);
            same.for_each(|(_, facts)| facts.tokens = Some(tokens.clone()));
            facts.tokens = Some(tokens);
        }
        self
    }

    /// What the base table of the last module was, for the metadata.
    pub fn base(mut self, digest: TableDigest, dtype: DType) -> Self {
        if let Some((_, facts)) = self.modules.last_mut() {
            facts.base_digest = Some(digest);
            facts.base_dtype = Some(dtype);
        }
        self
    }

    /// How the rows were initialised, for the metadata.
    pub fn init(mut self, how: impl Into<String>) -> Self {
        self.init = Some(how.into());
        self
    }

    /// Leaves all metadata out: the file is PEFT's own, byte for byte.
    pub fn without_metadata(mut self) -> Self {
        self.metadata = false;
        self
    }

    /// Checks and makes the adapter.
    ///
    /// # Errors
    ///
    /// [`Error::TensorShape`] if rows are not `[k, D]`, [`Error::Metadata`] if the metadata do not fit,
    /// [`Error::Field`] if the config does not fit the modules, or a path occurs twice; [`Error::TensorKey`] if an
    /// extra tensor is named as rows are, [`Error::Safetensors`] if its shape is not that of its bytes.
    pub fn build(mut self) -> Result<Adapter> {
        let config = self.config()?;
        let kind = config.peft_type();
        // Checked before they are left out: they must be no module's own path.
        check_paths(self.modules.iter().map(|(module, _)| module), &config)?;
        for (path, layer, rows) in std::mem::take(&mut self.layers) {
            let name = layer_key(kind, &path, layer);
            self.extra.push((
                name,
                file_dtype(rows.dtype()),
                rows.shape().to_vec(),
                rows.to_le_bytes(),
            ));
        }
        if kind == PeftType::Lora {
            self.modules
                .iter_mut()
                .for_each(|(module, _)| module.tied_paths.clear());
        }
        let mut metadata = AdapterMetadata::none();
        self.modules
            .sort_by_cached_key(|(module, _)| key_of(kind, &module.path));
        if self.metadata {
            metadata.library_version = Some(env!("CARGO_PKG_VERSION").to_owned());
            metadata.init = self.init;
            let facts = self
                .modules
                .iter()
                .map(|(module, facts)| (module.path.clone(), facts.clone()));
            metadata.set_modules(facts.collect());
        }
        let adapter = Adapter {
            extra: extra_tensors(kind, &self.extra)?,
            config,
            modules: self.modules.into_iter().map(|(module, _)| module).collect(),
            metadata,
            origin: PathBuf::from(ROWS_FILE),
        };
        adapter.checked()
    }
}

/// The rows of a whole table.
fn whole<S: EmbeddingSource>(table: &S) -> Result<TokenRows, S::Error> {
    let ids: Vec<_> = (0..=u32::MAX).map(TokenId).take(table.vocab_size()).collect();
    table.read_rows(&ids)
}

/// Puts tensors into a file of their own, in memory.
fn extra_tensors(
    kind: PeftType,
    tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)],
) -> Result<Vec<ExtraTensor>> {
    let path = PathBuf::from(ROWS_FILE);
    for (name, ..) in tensors {
        let expected = match key::parse(kind, name) {
            Key::Other => continue,
            Key::Rows(_) => "the name of another tensor; rows belong to modules".to_owned(),
            Key::Misnamed(expected) => expected,
        };
        return Err(Error::TensorKey {
            path,
            tensor: name.clone(),
            expected,
        });
    }
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let data = tensors.iter().map(|(name, dtype, shape, bytes)| TensorData {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
        bytes: Cow::Borrowed(bytes),
    });
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &BTreeMap::new(), data.collect()).map_err(Error::io("write", &path))?;
    let file = SafetensorsFile::from_bytes(path, bytes)?;
    let extra = file.names().map(|name| ExtraTensor {
        file: file.clone(),
        name: name.to_owned(),
    });
    Ok(extra.collect())
}

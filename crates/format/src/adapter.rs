//! An adapter directory: config, trained rows, metadata.

mod builder;
mod check;
mod extend;
mod key;
mod metadata;
mod parts;
mod read;
mod set;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use builder::AdapterBuilder;
pub use check::BaseCheck;
pub(crate) use check::{RecordedTable, weight_name};
pub use extend::SaveEmbeddingLayers;
use key::key_of;
pub use metadata::{AdapterMetadata, ModuleMetadata};
pub(crate) use parts::first_different_row;
pub use set::AdapterSet;
use trainable_tokens_core::{TokenId, TokenRows, TokenSet};

use crate::config::{AdapterConfig, TokenIndices};
use crate::error::{Error, Result};
use crate::file::{SafetensorsFile, TensorRef};

/// The file that holds the rows.
pub(crate) const ROWS_FILE: &str = "adapter_model.safetensors";

/// The trained rows of one module, and the modules that are tied to it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    path: String,
    tied_paths: Vec<String>,
    token_indices: Vec<u32>,
    rows: TokenRows,
}

impl AdapterModule {
    /// The module's path in the model, such as `model.embed_tokens`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Paths of modules that share the table and for which the file holds a copy of the rows, such as `lm_head`.
    /// PEFT writes these copies for a `TrainableTokensConfig`, but none with LoRA.
    pub fn tied_paths(&self) -> &[String] {
        &self.tied_paths
    }

    /// The ids of the trained tokens, in slot order.
    pub fn token_indices(&self) -> &[u32] {
        &self.token_indices
    }

    /// The ids of the trained tokens, in slot order.
    pub fn token_ids(&self) -> Vec<TokenId> {
        self.token_indices.iter().copied().map(TokenId).collect()
    }

    /// The ids, validated against a table of `vocab_size` rows.
    ///
    /// # Errors
    ///
    /// Those of [`TokenSet::new`].
    pub fn token_set(&self, vocab_size: usize) -> Result<TokenSet> {
        Ok(TokenSet::new(self.token_indices.iter().copied(), vocab_size)?)
    }

    /// The rows, `[k, D]`, in slot order.
    pub fn rows(&self) -> &TokenRows {
        &self.rows
    }

    /// The module's own path and those tied to it.
    pub fn all_paths(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.path)
            .chain(&self.tied_paths)
            .map(String::as_str)
    }
}

/// A trainable-tokens adapter of PEFT, as it lies in a directory.
///
/// The rows are the new rows themselves; row `i` belongs to `token_indices[i]`.
#[derive(Clone, Debug)]
pub struct Adapter {
    config: AdapterConfig,
    modules: Vec<AdapterModule>,
    metadata: AdapterMetadata,
    extra: Vec<ExtraTensor>,
    origin: PathBuf,
}

/// A tensor that is no trained rows; it stays in its file until it is written again.
#[derive(Clone, Debug)]
struct ExtraTensor {
    file: SafetensorsFile,
    name: String,
}

impl Adapter {
    /// Starts an adapter for the table of the module at `path`.
    pub fn builder(path: impl Into<String>, tokens: &TokenSet, rows: TokenRows) -> AdapterBuilder {
        AdapterBuilder::new(path.into(), tokens, rows)
    }

    /// The config.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// What the file says about itself beyond PEFT's format.
    pub fn metadata(&self) -> &AdapterMetadata {
        &self.metadata
    }

    /// The modules with rows of their own, in the order of the file: at least one, unless it is a LoRA adapter that
    /// trains no tokens.
    pub fn modules(&self) -> &[AdapterModule] {
        &self.modules
    }

    /// The module at `path`, or the one that it is tied to in the file.
    pub fn module(&self, path: &str) -> Option<&AdapterModule> {
        self.modules
            .iter()
            .find(|module| module.all_paths().any(|at| at == path))
    }

    /// The rows for the module at `path`, itself targeted or tied to one that is.
    pub fn rows(&self, path: &str) -> Option<&TokenRows> {
        self.module(path).map(AdapterModule::rows)
    }

    /// What the file says about the module at `path` (its own path): the metadata that hold for all modules, and its
    /// own.
    pub fn module_metadata(&self, path: &str) -> ModuleMetadata {
        self.metadata.of(path, self.first_module() == Some(path))
    }

    /// The paths in the file: of modules with rows, and the names of all other tensors as they are in the model.
    pub(crate) fn named_paths(&self) -> impl Iterator<Item = &str> {
        let rows = self.modules.iter().flat_map(AdapterModule::all_paths);
        rows.chain(self.extra_tensors().filter_map(key::name_in_model))
    }

    /// Names of the tensors of the file that are no trained rows, such as LoRA's weights, sorted.
    pub fn extra_tensors(&self) -> impl Iterator<Item = &str> {
        self.extra.iter().map(|extra| extra.name.as_str())
    }

    /// One of the [`extra_tensors`](Self::extra_tensors).
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`] if there is none of that name.
    pub fn extra_tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        match self.extra.iter().find(|extra| extra.name == name) {
            Some(extra) => extra.file.tensor(&extra.name),
            None => Err(Error::TensorMissing {
                path: self.origin.clone(),
                tensor: name.to_owned(),
                hint: String::new(),
            }),
        }
    }

    /// The files and names of the [`extra_tensors`](Self::extra_tensors).
    pub(crate) fn stored_extras(&self) -> impl Iterator<Item = (&SafetensorsFile, &str)> {
        self.extra.iter().map(|extra| (&extra.file, extra.name.as_str()))
    }

    /// The first value that is not finite: the module's path, the token, and the column.
    pub fn first_non_finite(&self) -> Option<(&str, TokenId, usize)> {
        self.modules.iter().find_map(|module| {
            let (row, column) = module.rows.first_non_finite()?;
            let id = module.token_indices.get(row)?;
            Some((module.path(), TokenId(*id), column))
        })
    }

    /// The same adapter with another config.
    ///
    /// # Errors
    ///
    /// Those of reading: the config must fit the rows and target their modules.
    pub fn with_config(self, config: AdapterConfig) -> Result<Self> {
        let stored = self.modules.iter().flat_map(|module| {
            let copies = module.all_paths();
            copies.map(|path| (path.to_owned(), module.rows.clone()))
        });
        let modules = parts::group(stored.collect(), &config, self.origin())?;
        Self {
            config,
            modules,
            ..self
        }
        .checked()
    }

    /// The same adapter with other metadata.
    ///
    /// # Errors
    ///
    /// Those of reading: the metadata must fit the config and the rows.
    pub fn with_metadata(self, metadata: AdapterMetadata) -> Result<Self> {
        Self { metadata, ..self }.checked()
    }

    /// The same adapter, said to be for a vocabulary of this size: PEFT's files do not tell that a model's vocabulary
    /// has grown, and [`table`](Self::table) does not guess it from an id past the end.
    ///
    /// # Errors
    ///
    /// [`Error::Metadata`] if an id is not below it.
    pub fn with_vocab_size(self, vocab_size: usize) -> Result<Self> {
        let mut metadata = self.metadata.clone();
        metadata.vocab_size = Some(vocab_size);
        metadata
            .modules
            .values_mut()
            .for_each(|module| module.vocab_size = None);
        self.with_metadata(metadata)
    }

    /// A LoRA adapter without its rows: what PEFT saves of a `LoraConfig` that trains no tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] unless it is a LoRA adapter.
    pub fn without_tokens(self) -> Result<Self> {
        Ok(Self {
            config: self
                .config
                .with_token_indices(&TokenIndices::ByModule(BTreeMap::new()))?,
            modules: Vec::new(),
            metadata: AdapterMetadata::none(),
            ..self
        })
    }

    /// The same adapter without the whole tables that it holds beside its rows.
    pub(crate) fn without_whole_tables(mut self) -> Self {
        let extra = std::mem::take(&mut self.extra);
        let (_, others) = extra
            .into_iter()
            .partition(|extra| self.is_whole_table(&extra.name));
        self.extra = others;
        self
    }

    /// The module whose table the single digest of the metadata belongs to: the first by name, as in the file.
    fn first_module(&self) -> Option<&str> {
        let paths = self.modules.iter().map(AdapterModule::path);
        paths.min_by_key(|path| key_of(self.config.peft_type(), path))
    }

    /// Where the rows were read from, or where they would go.
    pub(crate) fn origin(&self) -> &Path {
        &self.origin
    }
}

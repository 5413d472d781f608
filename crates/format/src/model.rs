//! What a model's config and names tell about its tables.

mod names;
mod resolve;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use resolve::TargetedTable;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::checkpoint::{Checkpoint, MODEL_CONFIG_FILE, Naming};
use crate::error::{Error, Result, one_line};
use crate::json::{MAX_CONFIG_BYTES, read_bytes, text_of};

/// The modules of a model that hold a table or could, and which of them are its input embedding, its head, and tied.
///
/// Of a checkpoint, [`of`](Self::of) tells this from `config.json` and from the tensors' names, for the architectures
/// of transformers. Of any other model, [`named`](Self::named) takes it from the caller.
#[derive(Clone, Debug)]
pub struct ModelTables {
    origin: PathBuf,
    modules: BTreeMap<String, Module>,
    input_embedding: Option<String>,
    head: Option<String>,
    tied: Vec<String>,
    vocab_size: Option<usize>,
}

/// What is known of a module.
#[derive(Clone, Debug, Default)]
struct Module {
    /// The shape of its weight, if it is known.
    shape: Option<Vec<usize>>,
    has_bias: bool,
}

impl ModelTables {
    /// The tables of a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] and those of reading, if there is a `config.json` but it cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.config_path();
        let config = if path.exists() {
            ModelConfig::parse(read_bytes(&path, MAX_CONFIG_BYTES)?, &path)?
        } else {
            ModelConfig::default()
        };
        Self::new(checkpoint, &config)
    }

    /// The tables of a checkpoint whose `config.json`, if there is one, holds these bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] and [`Error::TooLarge`] if it is no config.
    pub fn from_parts(checkpoint: &Checkpoint, config: Option<Vec<u8>>) -> Result<Self> {
        let config = match config {
            Some(config) => ModelConfig::parse(config, &checkpoint.config_path())?,
            None => ModelConfig::default(),
        };
        Self::new(&checkpoint.clone().with_names_of(&config)?, &config)
    }

    fn new(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let mut modules: BTreeMap<String, Module> = BTreeMap::new();
        for name in checkpoint.names() {
            if let Some(path) = name.strip_suffix(".weight") {
                let shape = Some(checkpoint.tensor(name)?.shape.to_vec());
                let has_bias = checkpoint.contains(&format!("{path}.bias"));
                let path = checkpoint.module_name(path);
                modules.insert(path.into_owned(), Module { shape, has_bias });
            }
        }
        let mut names: Vec<_> = checkpoint
            .names()
            .map(|name| checkpoint.module_name(name))
            .collect();
        names.sort_unstable();
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        let bare = checkpoint.naming().and_then(Naming::tied_if_bare);
        let known = names::roles(config, &names, bare);
        Ok(Self {
            origin: checkpoint.dir().to_owned(),
            modules,
            input_embedding: known.input_embedding,
            head: known.head,
            tied: known.tied,
            vocab_size: config.vocab_size,
        })
    }

    /// The modules of a model that is no checkpoint, by their paths, such as `model.embed_tokens`.
    pub fn named<S: Into<String>>(paths: impl IntoIterator<Item = S>) -> Self {
        let modules = paths.into_iter().map(|path| (path.into(), Module::default()));
        Self {
            origin: PathBuf::from("the model"),
            modules: modules.collect(),
            input_embedding: None,
            head: None,
            tied: Vec::new(),
            vocab_size: None,
        }
    }

    /// Says which module is the input embedding: what PEFT asks `get_input_embeddings()` for.
    pub fn with_input_embedding(mut self, path: impl Into<String>) -> Self {
        let path = path.into();
        self.modules.entry(path.clone()).or_default();
        self.input_embedding = Some(path);
        self
    }

    /// Says which modules share the input embedding's table, such as `lm_head`.
    pub fn with_tied<S: Into<String>>(mut self, paths: impl IntoIterator<Item = S>) -> Self {
        self.tied = paths.into_iter().map(Into::into).collect();
        self.tied.sort();
        self
    }

    /// The paths of all modules that may be targeted, those without a table of their own too.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let tied = self.tied.iter().filter(|path| !self.modules.contains_key(*path));
        self.modules.keys().chain(tied).map(String::as_str)
    }

    /// The input embedding, if it is known.
    pub fn input_embedding(&self) -> Option<&str> {
        self.input_embedding.as_deref()
    }

    /// The head that has a table of its own, if one is known.
    pub fn head(&self) -> Option<&str> {
        self.head.as_deref()
    }

    /// The modules that share the input embedding's table, sorted: for each of them PEFT stores a copy of the rows.
    pub fn tied(&self) -> &[String] {
        &self.tied
    }

    /// The size of the vocabulary that `config.json` states.
    pub fn vocab_size(&self) -> Option<usize> {
        self.vocab_size
    }

    /// The modules that have a table of token vectors: the input embedding, what is tied to it, and the head. If none is
    /// known, those that are named like one and may be one.
    pub(crate) fn token_tables(&self) -> Vec<&str> {
        if self.input_embedding.is_none() {
            let named = |path: &&String| names_a_table(path) && self.check_table(path).is_ok();
            return self.modules.keys().filter(named).map(String::as_str).collect();
        }
        let known = self.input_embedding().into_iter().chain(self.head());
        known.chain(self.tied.iter().map(String::as_str)).collect()
    }

    /// Whether the module has the input embedding's table: it is the input embedding, or tied with it.
    pub fn shares_input_embedding(&self, path: &str) -> bool {
        self.input_embedding() == Some(path) || self.tied.iter().any(|tied| tied == path)
    }

    /// Refuses a module that is no table: PEFT replaces rows of whatever linear layer a pattern hits.
    ///
    /// # Errors
    ///
    /// [`Error::NotATable`] with what tells it.
    pub fn check_table(&self, path: &str) -> Result<()> {
        let is_known = self.shares_input_embedding(path) || self.head() == Some(path);
        let Some(module) = self.modules.get(path).filter(|_| !is_known) else {
            return Ok(());
        };
        let rows = module.shape.as_ref().and_then(|shape| shape.first().copied());
        let is_vocabulary = self.vocab_size.is_some() && rows == self.vocab_size;
        let reason = match (&module.shape, self.vocab_size) {
            (Some(shape), _) if shape.len() != 2 => format!("its weight has the shape {shape:?}"),
            _ if names::is_head(path) && (is_vocabulary || self.vocab_size.is_none()) => return Ok(()),
            _ if module.has_bias => "it has a bias, as linear layers have".to_owned(),
            _ if names::is_embedding(path) => return Ok(()),
            _ if names::is_in_layer(path) => "it is part of a numbered layer".to_owned(),
            (Some(shape), Some(vocab_size)) if !is_vocabulary => {
                format!("its weight has the shape {shape:?}, and the vocabulary {vocab_size} tokens")
            }
            _ => return Ok(()),
        };
        Err(Error::NotATable {
            path: self.origin.clone(),
            module: path.to_owned(),
            reason,
        })
    }
}

/// Whether a module is an input embedding or a head, by its name.
pub(crate) fn names_a_table(path: &str) -> bool {
    names::is_head(path) || names::is_embedding(path)
}

/// What `config.json` says that matters here.
#[derive(Debug, Default)]
pub(crate) struct ModelConfig {
    pub(crate) model_type: Option<String>,
    architecture: Option<String>,
    tie_word_embeddings: Option<bool>,
    vocab_size: Option<usize>,
}

impl ModelConfig {
    pub(crate) fn parse(config: Vec<u8>, path: &Path) -> Result<Self> {
        let text = text_of(config, path, MAX_CONFIG_BYTES)?;
        let fields = Fields::parse(&text).map_err(|error| Error::Json {
            path: path.to_owned(),
            reason: format!("{}, in the model's {MODEL_CONFIG_FILE}", one_line(error)),
        })?;
        // Models of several parts keep the language model's fields apart.
        let text = fields.text_config.and_then(|raw| Fields::parse(raw.get()).ok());
        let text = text.unwrap_or_default();
        let architectures: Option<Vec<String>> = value(fields.architectures);
        Ok(Self {
            model_type: value(fields.model_type),
            architecture: architectures.and_then(|names| names.into_iter().next()),
            tie_word_embeddings: value(fields.tie_word_embeddings.or(text.tie_word_embeddings)),
            vocab_size: value(fields.vocab_size.or(text.vocab_size)),
        })
    }
}

/// The text of the fields that matter: values of a whole config could take a hundred times the memory of its text.
#[derive(Default, Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    model_type: Option<&'a RawValue>,
    #[serde(borrow)]
    architectures: Option<&'a RawValue>,
    #[serde(borrow)]
    tie_word_embeddings: Option<&'a RawValue>,
    #[serde(borrow)]
    vocab_size: Option<&'a RawValue>,
    #[serde(borrow)]
    text_config: Option<&'a RawValue>,
}

impl<'a> Fields<'a> {
    /// Whatever is no object has no fields.
    fn parse(text: &'a str) -> serde_json::Result<Self> {
        let value: &RawValue = serde_json::from_str(text)?;
        if !value.get().starts_with('{') {
            return Ok(Self::default());
        }
        serde_json::from_str(value.get())
    }
}

/// The value of a field; one of another type says nothing.
fn value<T: DeserializeOwned>(raw: Option<&RawValue>) -> Option<T> {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
}

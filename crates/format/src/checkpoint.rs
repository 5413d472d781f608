//! A Hugging Face checkpoint directory.

mod naming;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

pub(crate) use naming::Naming;
use naming::Spelling;
use serde_json::value::RawValue;
use trainable_tokens_core::ErrorKind;

use crate::adapter::{Adapter, weight_name};
use crate::error::{Error, Result, one_line};
use crate::file::{SafetensorsFile, TensorRef};
use crate::json::{MAX_CONFIG_BYTES, UniqueMap, read_bytes, text_of};
use crate::model::ModelConfig;
use crate::table::MappedTable;

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
pub(crate) const MODEL_CONFIG_FILE: &str = "config.json";
/// The largest index that is read; those of the largest models have a few megabytes.
pub(crate) const MAX_INDEX_BYTES: u64 = 16 << 20;

/// A checkpoint directory: `model.safetensors`, or the shards named by `model.safetensors.index.json`, mapped into
/// memory. As in transformers, the single file counts if both are there.
///
/// A tensor is found by the name that it is stored by and by the name that it has in the model: transformers loads
/// checkpoints of a base model, such as the Hub's `gpt2` with its `wte.weight`, into classes that name it
/// `transformer.wte.weight`. [`module_name`](Self::module_name) tells the latter.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which file holds which tensor.
    tensors: Arc<BTreeMap<String, usize>>,
    /// How modules are named, if not as their tensors are stored.
    naming: Option<Naming>,
}

impl Checkpoint {
    /// Maps and checks the checkpoint in `dir`; its `config.json` tells how modules are named.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is no checkpoint or a shard is absent; [`Error::Field`] if the index names a
    /// file outside the directory; [`Error::TensorMissing`] if a shard lacks a tensor that the index puts there;
    /// [`Error::Safetensors`] if a file is malformed or a tensor lies in two shards; [`Error::Unsupported`] if two tensors
    /// have one name in the model.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let checkpoint = Self::open_files(dir.as_ref())?;
        // A config that cannot be read has its error where it is needed.
        let path = checkpoint.config_path();
        let config = read_bytes(&path, MAX_CONFIG_BYTES).and_then(|bytes| ModelConfig::parse(bytes, &path));
        match config {
            Ok(config) => checkpoint.with_names_of(&config),
            Err(_) => Ok(checkpoint),
        }
    }

    fn open_files(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        if single.exists() {
            let file = SafetensorsFile::open(single)?;
            let tensors = file.names().map(|name| (name.to_owned(), 0)).collect();
            return Ok(Self {
                dir: dir.to_owned(),
                files: vec![file],
                tensors: Arc::new(tensors),
                naming: None,
            });
        }
        if !index.exists() {
            return Err(not_a_checkpoint(dir, single));
        }
        let index = read_bytes(&index, MAX_INDEX_BYTES)?;
        Self::from_parts(dir, index, |path| {
            if path.exists() {
                return SafetensorsFile::open(path);
            }
            let hint = "the index names it as a shard";
            let path = path.to_owned();
            Err(Error::NotFound { path, hint })
        })
    }

    /// Puts a checkpoint together from the bytes of its index and the shards that it names, which `shard` gives by
    /// their paths in `dir`. Modules are named as their tensors are.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open) and of `shard`; [`Error::Json`] if the index is no JSON.
    pub fn from_parts(
        dir: impl AsRef<Path>,
        index: Vec<u8>,
        mut shard: impl FnMut(&Path) -> Result<SafetensorsFile>,
    ) -> Result<Self> {
        let dir = dir.as_ref();
        let weight_map = weight_map(index, &dir.join(INDEX_FILE))?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors = BTreeMap::new();
        for (at, name) in shards.into_iter().enumerate() {
            let file = shard(&dir.join(name))?;
            for name in file.names() {
                if let Some(other) = tensors.insert(name.to_owned(), at) {
                    let other: &SafetensorsFile = &files[other];
                    let reason = format!("tensor {name:?} is also in {}", crate::error::shown(other.path()));
                    return Err(Error::Safetensors {
                        path: file.path().to_owned(),
                        reason,
                    });
                }
            }
            files.push(file);
        }
        for (name, shard) in &weight_map {
            let found = tensors.get(name).map(|at| files[*at].path());
            if found != Some(&dir.join(shard)) {
                return Err(Error::TensorMissing {
                    path: dir.join(shard),
                    tensor: name.clone(),
                    hint: format!(", though {INDEX_FILE} puts it there"),
                });
            }
        }
        tensors.retain(|name, _| weight_map.contains_key(name));
        Ok(Self {
            dir: dir.to_owned(),
            files,
            tensors: Arc::new(tensors),
            naming: None,
        })
    }

    /// The same checkpoint, its modules named as those of a model with this config.
    pub(crate) fn with_names_of(self, config: &ModelConfig) -> Result<Self> {
        let naming = Naming::of(config, &self.tensors, &self.dir)?;
        Ok(Self { naming, ..self })
    }

    /// The same checkpoint, its modules named as an adapter names them: with the prefix of the base model or, if it was made
    /// for transformers' `AutoModel`, without.
    ///
    /// # Errors
    ///
    /// [`Error::Base`] if the adapter names some modules with the prefix, and some without.
    pub fn named_for(&self, adapter: &Adapter) -> Result<Self> {
        let mut named = self.clone();
        let Some(naming) = self.naming else {
            return Ok(named);
        };
        let mut first: Option<(&str, Spelling)> = None;
        for path in adapter.named_paths() {
            let Some(spelling) = naming.spelling_of(path, &self.tensors) else {
                continue;
            };
            match first {
                Some((other, known)) if known != spelling => {
                    let prefix = naming.prefix();
                    let reason = format!(
                        "the adapter names modules both with {prefix:?} and without: {other:?} and {path:?}"
                    );
                    return Err(Error::Base {
                        path: self.dir.clone(),
                        kind: ErrorKind::File,
                        reason,
                    });
                }
                _ => first = Some((path, spelling)),
            }
        }
        if let Some((_, spelling)) = first {
            named.naming = Some(naming.with_modules(spelling));
        }
        Ok(named)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the model's `config.json` lies, whether or not it exists.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join(MODEL_CONFIG_FILE)
    }

    /// The mapped files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// The names by which the tensors are stored, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The names of the tensors in the order in which they lie in the files.
    pub(crate) fn names_by_place(&self) -> impl Iterator<Item = &str> {
        let names = self.files.iter().flat_map(SafetensorsFile::names_by_place);
        names.filter(|name| self.tensors.contains_key(*name))
    }

    /// The path in the model of a module, or the name of a tensor: that by which transformers' class and PEFT's adapters
    /// know it. It is told of the name in the model, of the stored one, and of one with or without the base model's prefix.
    pub fn module_name<'n>(&self, name: &'n str) -> Cow<'n, str> {
        match &self.naming {
            Some(naming) => naming.of_module(name, &self.tensors),
            None => name.into(),
        }
    }

    /// The name by which a tensor is stored, of either of its names; `None` if there is no such tensor.
    pub fn stored_name(&self, name: &str) -> Option<&str> {
        let stored = self.tensors.get_key_value(name).or_else(|| {
            let naming = self.naming.as_ref()?;
            let is_of_module = naming.of_module(name, &self.tensors) == name;
            let stored = is_of_module.then(|| naming.of_stored(name, &self.tensors))?;
            self.tensors.get_key_value(stored.as_ref())
        });
        stored.map(|(name, _)| name.as_str())
    }

    /// The name by which this checkpoint stores what `other` stores as `name`.
    pub(crate) fn counterpart(&self, name: &str, other: &Self) -> Option<&str> {
        let in_model = other.module_name(name);
        let in_model = self.stored_name(&self.module_name(&in_model));
        in_model.or_else(|| self.stored_name(name))
    }

    /// The name by which the table of the module at `path` is stored, if it is.
    pub(crate) fn stored_weight(&self, path: &str) -> Option<&str> {
        self.stored_name(&weight_name(path))
    }

    pub(crate) fn naming(&self) -> Option<&Naming> {
        self.naming.as_ref()
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.stored_name(name).is_some()
    }

    /// The tensor `name`.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`].
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let (file, name) = self.find(name)?;
        file.tensor(name)
    }

    /// The tensor `name` as a frozen table; the map is shared, nothing is copied.
    ///
    /// # Errors
    ///
    /// Those of [`SafetensorsFile::table`].
    pub fn table(&self, name: &str) -> Result<MappedTable> {
        let (file, name) = self.find(name)?;
        file.table(name)
    }

    /// The tensor `name` of one value per row of a vocabulary, as a table `V x 1`.
    pub(crate) fn column(&self, name: &str) -> Result<MappedTable> {
        let (file, name) = self.find(name)?;
        file.column(name)
    }

    /// The file that holds the tensor `name`.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`].
    pub fn shard_of(&self, name: &str) -> Result<&Path> {
        Ok(self.file_of(name)?.path())
    }

    pub(crate) fn file_of(&self, name: &str) -> Result<&SafetensorsFile> {
        Ok(self.find(name)?.0)
    }

    /// The file that holds a tensor, and the name that it has there.
    fn find(&self, name: &str) -> Result<(&SafetensorsFile, &str)> {
        let found = self.stored_name(name).and_then(|stored| {
            let file = self.files.get(*self.tensors.get(stored)?)?;
            Some((file, stored))
        });
        found.ok_or_else(|| Error::TensorMissing {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            hint: similar(self.names(), name),
        })
    }
}

/// Names that end like the missing one, for the message.
fn similar<'a>(names: impl Iterator<Item = &'a str>, missing: &str) -> String {
    let tail: Vec<_> = missing.rsplit('.').take(2).collect();
    let mut close = names.filter(|name| name.rsplit('.').take(2).eq(tail.iter().copied()));
    match close.next() {
        Some(name) => format!("; there is {name:?}"),
        None => String::new(),
    }
}

fn not_a_checkpoint(dir: &Path, single: PathBuf) -> Error {
    if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
        return Error::Unsupported {
            path: dir.to_owned(),
            what: "only a pickled checkpoint (pytorch_model.bin) is there; convert it to safetensors".into(),
        };
    }
    if dir.exists() {
        let hint = "a checkpoint directory holds it or model.safetensors.index.json";
        return Error::NotFound { path: single, hint };
    }
    let hint = "expected a checkpoint directory";
    Error::NotFound {
        path: dir.to_owned(),
        hint,
    }
}

/// The `weight_map` of an index: tensor name to file name, all inside the directory.
fn weight_map(index: Vec<u8>, path: &Path) -> Result<BTreeMap<String, String>> {
    const FIELD: &str = "weight_map";
    let text = text_of(index, path, MAX_INDEX_BYTES)?;
    let json = |error: serde_json::Error| Error::Json {
        path: path.to_owned(),
        reason: one_line(error),
    };
    let UniqueMap(mut fields) = serde_json::from_str::<UniqueMap<&RawValue>>(&text).map_err(json)?;
    let raw = fields
        .remove(FIELD)
        .ok_or_else(|| Error::field(path, FIELD, "it is missing"))?;
    let UniqueMap(map) = serde_json::from_str::<UniqueMap<String>>(raw.get())
        .map_err(|error| Error::field(path, FIELD, one_line(error)))?;
    for (tensor, file) in &map {
        let mut components = Path::new(file).components();
        let plain = matches!(components.next(), Some(Component::Normal(name)) if name == file.as_str());
        if !plain || components.next().is_some() || file.contains(['\\', '\0']) {
            let reason = format!("{file:?} is not a plain file name in the directory");
            return Err(Error::field(path, format!("{FIELD}[{tensor:?}]"), reason));
        }
    }
    Ok(map)
}

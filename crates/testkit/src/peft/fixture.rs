//! Reading a case.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use trainable_tokens_core::{LayerOptions, TokenRows, TokenSet};
use trainable_tokens_format::{Checkpoint, SafetensorsFile};

use super::module::Module;

use crate::failure::same;
use crate::{Failure, world};

/// What `case.json` may hold. What says nothing about results is only read by people: words, the environment, and the
/// sizes of what lies in the files beside it.
const FIELDS: [&str; 38] = [
    "adapter_names",
    "adapters",
    "autocast_adapter_dtype",
    "base",
    "description",
    "ensure_weight_tying",
    "expected",
    "hyper",
    "matched_modules",
    "merged_checkpoint",
    "merged_dir",
    "modules",
    "name",
    "new_vocab",
    "observations",
    "old_vocab",
    "operations",
    "overlap",
    "peft_backward",
    "peft_config",
    "peft_forward",
    "peft_init",
    "peft_merge",
    "peft_mixed",
    "peft_quirks",
    "peft_reload",
    "peft_save",
    "rounding",
    "schema",
    "target_modules_given",
    "title",
    "token_indices",
    "tokenizer_examples",
    "trainable_parameters",
    "trainable_token_indices",
    "variants",
    "versions",
    "wrapped_modules",
];

/// A case as it lies in its directory: embeddings, their trainable tokens, and what PEFT did with them.
#[derive(Clone, Debug)]
pub struct Fixture {
    dir: PathBuf,
    json: Value,
    recorded: Option<SafetensorsFile>,
    /// Names of recorded tensors that were looked at.
    read: RefCell<BTreeSet<String>>,
    first: Module,
    tokens: TokenSet,
}

impl Fixture {
    /// Reads the case in `dir`.
    ///
    /// # Errors
    ///
    /// If a file is missing or malformed, or if the files contradict each other.
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("case.json");
        let json = std::fs::read(&path)
            .map_err(|error| Failure::new(format!("cannot read {}: {error}", path.display())))?;
        let json: Value = serde_json::from_slice(&json)?;
        super::value::only("case.json", &json, &FIELDS)?;
        // A case of nothing but an error has no results.
        let path = dir.join("expected.safetensors");
        let recorded = if path.exists() || json["expected"].is_object() {
            Some(SafetensorsFile::open(path)?)
        } else {
            None
        };
        let first = Module::first(dir, &json)?;
        let ids = super::adapters::recorded_ids(&json, None, &first.path)?;
        let tokens = TokenSet::new(ids, first.table.num_rows())?;
        let read = RefCell::default();
        let fixture = Self {
            dir: dir.to_owned(),
            json,
            recorded,
            read,
            first,
            tokens,
        };
        if fixture.has("base.weight") {
            same(
                "base.weight and the checkpoint",
                &fixture.rows("base.weight")?,
                fixture.table(),
            )?;
        }
        Ok(fixture)
    }

    /// The whole of `case.json`.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The frozen table: that of the first module, if there are several.
    pub fn table(&self) -> &TokenRows {
        &self.first.table
    }

    /// The trainable tokens: those of the first module and the first adapter, if there are several.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// The options of the first module, as torch's `nn.Embedding` and transformers' scaled ones mean them.
    pub fn options(&self) -> LayerOptions {
        self.first.options
    }

    /// The first module.
    pub(super) fn first(&self) -> &Module {
        &self.first
    }

    /// The module that an operation names, or else the first one, with the table that it has in the operation's base.
    pub(super) fn module(&self, operation: &Value) -> Result<Module, Failure> {
        let path = operation["module"].as_str().unwrap_or(&self.first.path);
        Module::open(&self.dir, &self.json, path, base_dir(operation))
    }

    /// The checkpoint that an operation starts from.
    pub(super) fn base(&self, operation: &Value) -> Result<Checkpoint, Failure> {
        Ok(Checkpoint::open(self.dir.join(base_dir(operation)))?)
    }

    /// Whether a tensor of this name is recorded.
    pub fn has(&self, name: &str) -> bool {
        self.recorded.as_ref().is_some_and(|file| file.contains(name))
    }

    /// The names of all recorded tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.recorded.iter().flat_map(SafetensorsFile::names)
    }

    /// Names of recorded tensors that nothing has looked at yet.
    pub(super) fn unread(&self) -> impl Iterator<Item = &str> {
        let read = self.read.borrow().clone();
        self.names().filter(move |name| !read.contains(*name))
    }

    fn tensor(&self, name: &str) -> Result<trainable_tokens_format::TensorRef<'_>, Failure> {
        self.read.borrow_mut().insert(name.to_owned());
        let recorded = self.recorded.as_ref();
        Ok(recorded
            .ok_or_else(|| format!("{name} is not recorded"))?
            .tensor(name)?)
    }

    /// A recorded float tensor; all dimensions but the last are one.
    ///
    /// # Errors
    ///
    /// If there is none of this name, or if it does not hold floats.
    pub fn rows(&self, name: &str) -> Result<TokenRows, Failure> {
        let tensor = self.tensor(name)?;
        let (columns, leading) = tensor
            .shape
            .split_last()
            .ok_or_else(|| Failure::new(format!("{name} has no dimension")))?;
        let rows = leading.iter().product();
        Ok(TokenRows::from_le_bytes(
            tensor.float_dtype()?,
            rows,
            *columns,
            tensor.bytes,
        )?)
    }

    /// A recorded tensor of 64-bit token ids, flattened.
    ///
    /// # Errors
    ///
    /// If there is none of this name, or if it does not hold such ids.
    pub fn ids(&self, name: &str) -> Result<Vec<u32>, Failure> {
        let tensor = self.tensor(name)?;
        let elements: usize = tensor.shape.iter().product();
        if tensor.float_dtype().is_ok() || Some(tensor.bytes.len()) != elements.checked_mul(8) {
            return Err(Failure::new(format!("{name} does not hold 64-bit integers")));
        }
        let (ids, _) = tensor.bytes.as_chunks();
        let ids = ids.iter().map(|bytes| u32::try_from(i64::from_le_bytes(*bytes)));
        Ok(ids.collect::<Result<_, _>>()?)
    }

    /// The rows that training starts from, in the type that PEFT trained them in.
    ///
    /// # Errors
    ///
    /// If what is recorded cannot be read.
    pub fn initial_rows(&self) -> Result<TokenRows, Failure> {
        if self.has("delta.init") {
            return self.rows("delta.init");
        }
        let ids: Vec<u32> = self.tokens.ids().iter().map(|id| id.0).collect();
        let rows = world::select(self.table(), &ids)?;
        Ok(rows.to_dtype(self.table().dtype().default_row_dtype()))
    }

    /// The rows of the adapter that PEFT saved, in the type of its file.
    ///
    /// # Errors
    ///
    /// If the adapter cannot be read, or if it is not the one that is recorded.
    pub fn adapter_rows(&self) -> Result<TokenRows, Failure> {
        let adapters = self.adapters(&Value::Null, &self.first)?;
        let [adapter] = &adapters[..] else {
            return Err(Failure::new("it has not one adapter for the module"));
        };
        if self.has("delta.trained") {
            same("the adapter's rows", &adapter.rows, &self.rows("delta.trained")?)?;
        }
        Ok(adapter.rows.clone())
    }

    /// The operations that PEFT did.
    pub(super) fn operations(&self) -> Result<&[Value], Failure> {
        let operations = self.json["operations"].as_array();
        Ok(operations.ok_or("operations is no list")?)
    }

    /// Whether PEFT failed at `what`, such as `peft_forward`.
    pub(super) fn peft_refuses(&self, what: &str) -> bool {
        self.json[what]["status"] == "error"
    }
}

/// The directory of the checkpoint that an operation starts from.
fn base_dir(operation: &Value) -> &str {
    operation["base"].as_str().unwrap_or("base")
}

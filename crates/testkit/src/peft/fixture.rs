//! Reading a case.

use std::path::{Path, PathBuf};

use serde_json::Value;
use trainable_tokens_core::{
    EmbeddingSource, LayerOptions, MaxNorm, Padding, PaddingRule, TokenId, TokenRows, TokenSet,
};
use trainable_tokens_format::{Adapter, Checkpoint, SafetensorsFile};

use crate::failure::{equal, same};
use crate::{Failure, world};

/// A case as it lies in its directory: one embedding, its trainable tokens, and what PEFT did with them.
#[derive(Clone, Debug)]
pub struct Fixture {
    dir: PathBuf,
    json: Value,
    recorded: SafetensorsFile,
    table: TokenRows,
    tokens: TokenSet,
    options: LayerOptions,
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
        let recorded = SafetensorsFile::open(dir.join("expected.safetensors"))?;
        let module = &json["modules"][0];
        let table = Checkpoint::open(dir.join("base"))?.table(text(module, "param")?)?;
        let shape = [count(module, "num_embeddings")?, count(module, "embedding_dim")?];
        let table = TokenRows::from_le_bytes(table.dtype(), shape[0], shape[1], table.bytes())?;
        let ids = json["token_indices"]
            .as_array()
            .ok_or("token_indices is no list")?;
        let ids: Vec<u32> = ids.iter().map(id).collect::<Result<_, _>>()?;
        let fixture = Self {
            dir: dir.to_owned(),
            tokens: TokenSet::new(ids, shape[0])?,
            options: options(module)?,
            recorded,
            table,
            json,
        };
        if fixture.has("base.weight") {
            same(
                "base.weight and the checkpoint",
                &fixture.rows("base.weight")?,
                &fixture.table,
            )?;
        }
        Ok(fixture)
    }

    /// The whole of `case.json`.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The frozen table.
    pub fn table(&self) -> &TokenRows {
        &self.table
    }

    /// The trainable tokens.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// The options of the embedding, as torch's `nn.Embedding` means them.
    pub fn options(&self) -> LayerOptions {
        self.options
    }

    /// Whether a tensor of this name is recorded.
    pub fn has(&self, name: &str) -> bool {
        self.recorded.contains(name)
    }

    /// A recorded float tensor; all dimensions but the last are one.
    ///
    /// # Errors
    ///
    /// If there is none of this name, or if it does not hold floats.
    pub fn rows(&self, name: &str) -> Result<TokenRows, Failure> {
        let tensor = self.recorded.tensor(name)?;
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
        let tensor = self.recorded.tensor(name)?;
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
        let rows = world::select(&self.table, &ids)?;
        Ok(rows.to_dtype(self.table.dtype().default_row_dtype()))
    }

    /// The rows of the adapter that PEFT saved, in the type of its file.
    ///
    /// # Errors
    ///
    /// If the adapter cannot be read, or if it is not the one that is recorded.
    pub fn adapter_rows(&self) -> Result<TokenRows, Failure> {
        let adapter = Adapter::read(self.dir.join("adapter"))?;
        let module = adapter
            .module(text(&self.json["modules"][0], "path")?)
            .ok_or("the adapter has no rows of the module")?;
        equal(
            "the adapter's tokens",
            &module.token_ids(),
            &self.tokens.ids().to_vec(),
        )?;
        let rows = module.rows().clone();
        if self.has("delta.trained") {
            same("the adapter's rows", &rows, &self.rows("delta.trained")?)?;
        }
        Ok(rows)
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

/// The options of `torch.nn.Embedding`.
fn options(module: &Value) -> Result<LayerOptions, Failure> {
    let mut options = LayerOptions::default();
    for (name, value) in module.as_object().ok_or("modules[0] is no object")? {
        match name.as_str() {
            // `sparse` is the layout of torch's gradient of the whole table, which is never made here.
            "path" | "param" | "num_embeddings" | "embedding_dim" | "sparse" => {}
            "padding_idx" => {
                options.padding = Some(Padding {
                    token: TokenId(id(value)?),
                    rule: PaddingRule::NoLookupGradient,
                });
            }
            "scale_grad_by_freq" => options.scale_grad_by_freq = flag(module, name)?,
            "max_norm" => options.max_norm = Some(MaxNorm::new(number(module, name)?)?),
            _ => {
                return Err(Failure::new(format!(
                    "the option {name} of the module is unknown"
                )));
            }
        }
    }
    Ok(options)
}

fn id(value: &Value) -> Result<u32, Failure> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Failure::new(format!("{value} is no token id")))
}

fn field<'a, T>(
    of: &'a Value,
    name: &str,
    kind: &str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<T, Failure> {
    read(&of[name]).ok_or_else(|| Failure::new(format!("{name} is {}, expected {kind}", of[name])))
}

/// The text at `name`.
pub(super) fn text<'a>(of: &'a Value, name: &str) -> Result<&'a str, Failure> {
    field(of, name, "a text", Value::as_str)
}

/// The number at `name`.
pub(super) fn number(of: &Value, name: &str) -> Result<f64, Failure> {
    field(of, name, "a number", Value::as_f64)
}

/// The truth at `name`.
pub(super) fn flag(of: &Value, name: &str) -> Result<bool, Failure> {
    field(of, name, "true or false", Value::as_bool)
}

/// The count at `name`.
pub(super) fn count(of: &Value, name: &str) -> Result<usize, Failure> {
    let count = field(of, name, "a count", Value::as_u64)?;
    Ok(usize::try_from(count)?)
}

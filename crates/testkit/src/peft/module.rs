//! A module with a table.

use std::path::Path;

use serde_json::Value;
use trainable_tokens_core::{
    DType, Element, EmbedScale, EmbeddingSource, LayerOptions, MaxNorm, Padding, PaddingRule, TokenId,
    TokenRows,
};
use trainable_tokens_format::{Adapter, Checkpoint};

use super::value::{count, flag, id, number, text};
use crate::Failure;
use crate::failure::{ensure, equal};

/// An embedding or a head of the model, and how it is used.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// Its path.
    pub(super) path: String,
    /// The module whose table it has: itself, unless it is tied.
    pub(super) owner: String,
    /// The name of the table in the checkpoint.
    pub(super) tensor: String,
    pub(super) table: TokenRows,
    pub(super) options: LayerOptions,
}

impl Module {
    /// The first module of a case: the one that it describes first, or else the one that its first adapter is for.
    pub(super) fn first(dir: &Path, json: &Value) -> Result<Self, Failure> {
        let mut operations = json["operations"].as_array().into_iter().flatten();
        let base = operations.find_map(|operation| operation["base"].as_str());
        let path = if let Some(path) = json["modules"][0]["path"].as_str() {
            path.to_owned()
        } else {
            let adapter = Adapter::read(dir.join(text(&json["adapters"][0], "dir")?))?;
            let module = adapter.modules().first().ok_or("its first adapter has no rows")?;
            module.path().to_owned()
        };
        Self::open(dir, json, &path, base.unwrap_or("base"))
    }

    /// The module at `path`, with its table in the checkpoint `base` of the case.
    pub(super) fn open(dir: &Path, json: &Value, path: &str, base: &str) -> Result<Self, Failure> {
        let checkpoint = Checkpoint::open(dir.join(base))?;
        let described = |path: &str| {
            let mut modules = json["modules"].as_array().into_iter().flatten();
            modules.find(|module| module["path"] == path)
        };
        let own = format!("{path}.weight");
        let (owner, tensor) = match described(path) {
            Some(module) => (path, module["param"].as_str().unwrap_or(&own).to_owned()),
            None if checkpoint.contains(&own) => (path, own),
            None => {
                let owner = tied_to(json, path)?;
                (owner, format!("{owner}.weight"))
            }
        };
        let table = checkpoint.table(&tensor)?;
        let shape = [table.vocab_size(), table.embedding_dim()];
        // A module that is not described has no gradient recorded, so nothing hangs on its options.
        let mut options = LayerOptions::default();
        if let Some(module) = described(owner) {
            let stated = [count(module, "num_embeddings")?, count(module, "embedding_dim")?];
            equal("the table's shape", &shape, &stated)?;
            options = self::options(module, json)?;
        }
        Ok(Self {
            path: path.to_owned(),
            owner: owner.to_owned(),
            table: TokenRows::from_le_bytes(table.dtype(), shape[0], shape[1], table.bytes())?,
            tensor,
            options,
        })
    }

    /// The same module of a model that was cast to another type.
    pub(super) fn cast(&self, dtype: DType) -> Self {
        Self {
            table: self.table.to_dtype(dtype),
            ..self.clone()
        }
    }

    /// The same module with a table that was widened to `dtype`: the scale stays that of the narrow type.
    pub(super) fn options_over(&self, dtype: DType) -> LayerOptions {
        if dtype == self.table.dtype() {
            return self.options;
        }
        // Frameworks compute in half types and in single precision with a single-precision factor.
        let factor = |scale: EmbedScale| <f32 as Element>::from_f64(scale.factor(self.table.dtype()));
        LayerOptions {
            scale: self
                .options
                .scale
                .map(|scale| EmbedScale::Exact(f64::from(factor(scale)))),
            ..self.options
        }
    }
}

/// The module whose table the one at `path` has, which is not in the checkpoint itself.
fn tied_to<'a>(json: &'a Value, path: &str) -> Result<&'a str, Failure> {
    let first = &json["modules"][0];
    let wrapped = &json["wrapped_modules"][path];
    // PEFT calls a module tied if it has no rows of its own; a head with tokens of its own is tied all the same.
    ensure!(
        wrapped["tied"] == true || (path == "lm_head" && json["base"]["tie_word_embeddings"] == true),
        "module {path} has no table, but nothing says that it is tied"
    );
    ensure!(
        wrapped["base_layer"] == "Linear" || wrapped["base_layer"] == first["class"],
        "module {path} is {}, but the one that it is tied to is {}",
        wrapped["base_layer"],
        first["class"]
    );
    text(first, "path")
}

/// The options of `torch.nn.Embedding`, and the scale of transformers' embeddings.
fn options(module: &Value, json: &Value) -> Result<LayerOptions, Failure> {
    let mut options = LayerOptions::default();
    for (name, value) in module.as_object().ok_or("the module is no object")? {
        match name.as_str() {
            // `sparse` is the layout of torch's gradient of the whole table, which is never made here.
            "path" | "param" | "num_embeddings" | "embedding_dim" | "sparse" | "class" => {}
            "padding_idx" | "embed_scale" if value.is_null() => {}
            "padding_idx" => {
                options.padding = Some(Padding {
                    token: TokenId(id(value)?),
                    rule: PaddingRule::NoLookupGradient,
                });
            }
            "scale_grad_by_freq" => options.scale_grad_by_freq = flag(module, name)?,
            "max_norm" => options.max_norm = Some(MaxNorm::new(number(module, name)?)?),
            "embed_scale" => options.scale = Some(scale(number(module, name)?, module, json)?),
            _ => {
                return Err(Failure::new(format!(
                    "the option {name} of the module is unknown"
                )));
            }
        }
    }
    Ok(options)
}

/// Gemma's embeddings keep the factor as a tensor of the model's type; BART's multiply by a Python number.
fn scale(factor: f64, module: &Value, json: &Value) -> Result<EmbedScale, Failure> {
    let class = module["class"].as_str().or(json["base"]["architecture"].as_str());
    let class = class.ok_or("nothing says what kind of embedding is scaled")?;
    if class.starts_with("Gemma") {
        Ok(EmbedScale::TableDType(factor))
    } else if class.starts_with("Bart") {
        Ok(EmbedScale::Exact(factor))
    } else {
        Err(Failure::new(format!("how {class} scales is unknown")))
    }
}

//! New adapters for a model.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;

use serde::Deserialize;
use serde_json::{Map, Value};
use trainable_tokens_core::{EmbeddingSource as _, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterBuilder, AdapterConfig, AdapterSet, Checkpoint, ModelTables, PeftType, SafetensorsFile,
    SaveEmbeddingLayers, TargetModules, TokenIndices, digest,
};

/// What is asked for. Paths of files are relative to where the program runs.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    /// The checkpoint of the model that the rows are for, at its present size.
    model: String,
    /// The adapters by name.
    adapters: BTreeMap<String, Wanted>,
    /// Whether the files say more about themselves than PEFT's.
    metadata: bool,
    /// `"auto"`, `true` or `false`.
    save_embedding_layers: Value,
    /// The vocabulary of the model that `base_model_name_or_path` names, from before it grew.
    named_vocab_size: Option<usize>,
    /// Whether to keep the whole head too, where it is not tied.
    save_head: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    /// A file of rows by the path of their module, and of other tensors by the names that they keep.
    tensors: String,
    /// The token ids of each module with rows of its own.
    modules: BTreeMap<String, Vec<u32>>,
    /// `"TRAINABLE_TOKENS"` or `"LORA"`.
    peft_type: String,
    /// Fields of the config that are not PEFT's defaults.
    fields: Map<String, Value>,
}

/// The adapters that the file at `path` asks for.
pub(crate) fn adapters(path: &str) -> Result<AdapterSet, Box<dyn Error>> {
    let spec: Spec = serde_json::from_slice(&fs::read(path)?)?;
    let model = Checkpoint::open(&spec.model)?;
    let mut set = AdapterSet::new();
    for (name, wanted) in &spec.adapters {
        set.insert(name, adapter(&spec, wanted, &model)?)?;
    }
    Ok(set)
}

fn adapter(spec: &Spec, wanted: &Wanted, model: &Checkpoint) -> Result<Adapter, Box<dyn Error>> {
    let tables = ModelTables::of(model)?;
    let tensors = SafetensorsFile::open(&wanted.tensors)?;
    let save = match &spec.save_embedding_layers {
        Value::Bool(true) => SaveEmbeddingLayers::Always,
        Value::Bool(false) => SaveEmbeddingLayers::Never,
        _ => SaveEmbeddingLayers::Auto,
    };
    let mut builder: Option<AdapterBuilder> = None;
    for (path, ids) in &wanted.modules {
        // What is tied to a module has no table of its own.
        let table = model.table(&format!("{path}.weight"))?;
        let tokens = TokenSet::new(ids.iter().copied(), table.vocab_size())?;
        let rows = tensors.tensor(path)?.to_rows()?;
        let mut module = match builder.take() {
            None => Adapter::builder(path, &tokens, rows),
            Some(builder) => builder.module_of(path, &tokens, rows),
        };
        module = module.base(digest(&table)?, table.dtype());
        if tables.shares_input_embedding(path) {
            for tied in tables.tied().iter().filter(|tied| *tied != path) {
                module = module.tied(tied);
            }
        }
        if save.decide(table.vocab_size(), spec.named_vocab_size) {
            module = module.embedding_layer(&table)?;
        }
        builder = Some(module);
    }
    let mut builder = builder.ok_or("an adapter has modules")?;
    if let Some(head) = tables.head().filter(|_| spec.save_head) {
        builder = builder.head_layer(head, &model.table(&format!("{head}.weight"))?)?;
    }
    for name in tensors.names().filter(|name| !wanted.modules.contains_key(*name)) {
        let tensor = tensors.tensor(name)?;
        builder = builder.extra_tensor(name, tensor.dtype, tensor.shape, tensor.bytes.to_vec());
    }
    if !spec.metadata {
        builder = builder.without_metadata();
    }
    if wanted.peft_type == PeftType::Lora.as_str() {
        let config = AdapterConfig::lora(&TokenIndices::ByModule(BTreeMap::new()))?;
        return Ok(builder.lora(with_fields(config, &wanted.fields)?).build()?);
    }
    match wanted.fields.get("target_modules") {
        Some(Value::String(pattern)) => {
            builder = builder.target_modules(TargetModules::Pattern(pattern.clone()));
        }
        Some(list) => builder = builder.target_modules(serde_json::from_value::<Vec<String>>(list.clone())?),
        None => {}
    }
    let adapter = builder.build()?;
    let config = with_fields(adapter.config().clone(), &wanted.fields)?;
    Ok(adapter.with_config(config)?)
}

fn with_fields(
    mut config: AdapterConfig,
    fields: &Map<String, Value>,
) -> Result<AdapterConfig, Box<dyn Error>> {
    for (name, value) in fields {
        config = config.with_field(name, value)?;
    }
    Ok(config)
}

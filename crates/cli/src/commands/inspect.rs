//! `inspect`: what an adapter, a safetensors file or a model directory holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::{
    Adapter, AdapterModule, BaseCheck, Checkpoint, LoraLayer, LoraWeights, SafetensorsFile,
};
use trainable_tokens_trainer::Vocabulary;

use super::adapters_in;
use crate::args::{Cli, InspectArgs};
use crate::model::{Model, misfit};
use crate::output::{bytes, print};
use crate::rows::{RowReport, row_reports, rows_table, text_table};

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Output {
    Adapter(AdapterOutput),
    /// Several adapters in one directory.
    Adapters {
        adapters: BTreeMap<String, AdapterOutput>,
    },
    Safetensors {
        tensors: Vec<TensorOutput>,
        metadata: serde_json::Value,
    },
    Model(ModelOutput),
}

#[derive(Serialize)]
struct AdapterOutput {
    peft_type: &'static str,
    modules: Vec<ModuleOutput>,
    /// LoRA's weights, where there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lora: Vec<LoraOutput>,
    /// Why LoRA's weights cannot be merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsupported: Option<String>,
    target_modules: serde_json::Value,
    base_model_name_or_path: Option<String>,
    peft_version: Option<String>,
    vocab_size: Option<usize>,
    base_digest: Option<String>,
    init: Option<String>,
    bytes: u64,
    extra_tensors: Vec<String>,
}

#[derive(Serialize)]
struct ModuleOutput {
    module: String,
    tied: Vec<String>,
    dtype: String,
    shape: [usize; 2],
    rows: Vec<RowOutput>,
}

/// Where a model was given, what became of its row too.
#[derive(Serialize)]
#[serde(untagged)]
enum RowOutput {
    Compared(RowReport),
    Alone {
        token_id: u32,
        token: Option<String>,
        norm: f64,
    },
}

#[derive(Serialize)]
struct LoraOutput {
    module: String,
    layer: &'static str,
    rank: usize,
    scaling: f64,
    in_features: usize,
    out_features: usize,
    dtypes: [String; 2],
}

#[derive(Serialize)]
struct TensorOutput {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

#[derive(Serialize)]
struct ModelOutput {
    model_type: String,
    vocab_size: usize,
    embedding_dim: usize,
    dtype: String,
    digest: String,
    tie_word_embeddings: bool,
    /// The output layer, if the checkpoint has one.
    head: Option<String>,
    pad_token_id: Option<u32>,
    table_bytes: usize,
    /// Rows that no token of the tokenizer uses, where there is a tokenizer.
    free_rows: Option<Vec<u32>>,
    tensors: Vec<TensorOutput>,
}

pub(super) fn run(args: &InspectArgs, cli: &Cli) -> Result<()> {
    let path = &args.path;
    let adapters = adapters_in(path)?;
    let output = if let [(None, dir)] = &adapters[..]
        && dir.join("adapter_config.json").is_file()
    {
        Output::Adapter(adapter(dir, args.model.as_deref())?)
    } else if adapters.iter().any(|(name, _)| name.is_some()) && !path.join("config.json").exists() {
        let shown = |(name, dir): (Option<String>, PathBuf)| {
            Ok((name.unwrap_or_default(), adapter(&dir, args.model.as_deref())?))
        };
        Output::Adapters {
            adapters: adapters.into_iter().map(shown).collect::<Result<_>>()?,
        }
    } else if path.is_dir() && !path.join("config.json").exists() {
        bail!(
            "{} is neither an adapter nor a model: it holds neither adapter_config.json nor config.json",
            path.display()
        );
    } else if path.is_dir() {
        Output::Model(model(path)?)
    } else if path.is_file() {
        let is_named_so = path.extension().is_some_and(|it| it == "safetensors");
        safetensors(path).map_err(|error| {
            if is_named_so {
                return error;
            }
            let message = format!("{error}; an adapter, a model or a safetensors file can be inspected");
            error.context(message)
        })?
    } else {
        bail!("{} does not exist", path.display());
    };
    print(cli.json, &output, to_text)
}

fn adapter(dir: &Path, base: Option<&Path>) -> Result<AdapterOutput> {
    let adapter = Adapter::read(dir)?;
    let base = base.map(Checkpoint::open).transpose()?;
    // To be looked at, an adapter need not be one that can be merged.
    let (lora, unsupported) = match adapter.lora_weights() {
        Ok(lora) => (lora, None),
        Err(error) if base.is_none() => (Vec::new(), Some(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    if let Some(base) = &base {
        let fits = adapter.check_against(base, BaseCheck::Fits);
        fits.map_err(|error| misfit(dir, error))?;
        adapter.lora_deltas(base).map_err(|error| misfit(dir, error))?;
    }
    let config = adapter.config();
    let metadata = adapter.metadata();
    let module = |module: &AdapterModule| -> Result<ModuleOutput> {
        Ok(ModuleOutput {
            module: module.path().to_owned(),
            tied: module.tied_paths().to_vec(),
            dtype: module.rows().dtype().to_string(),
            shape: module.rows().shape(),
            rows: match &base {
                Some(base) => compared(&adapter, module, base)?,
                None => alone(&adapter, module),
            },
        })
    };
    let factors: Vec<&str> = lora.iter().flat_map(LoraWeights::tensors).collect();
    let others = adapter.extra_tensors().filter(|name| !factors.contains(name));
    Ok(AdapterOutput {
        peft_type: config.peft_type().as_str(),
        lora: lora.iter().map(lora_output).collect(),
        unsupported,
        modules: adapter.modules().iter().map(module).collect::<Result<_>>()?,
        target_modules: config.field("target_modules").unwrap_or_default(),
        base_model_name_or_path: config.base_model_name_or_path().map(str::to_owned),
        peft_version: config.peft_version().map(str::to_owned),
        vocab_size: metadata.vocab_size,
        base_digest: metadata.base_digest.map(|digest| digest.to_string()),
        init: metadata.init.clone(),
        bytes: fs::metadata(dir.join("adapter_model.safetensors"))?.len(),
        extra_tensors: others.map(str::to_owned).collect(),
    })
}

fn lora_output(lora: &LoraWeights) -> LoraOutput {
    LoraOutput {
        module: lora.path().to_owned(),
        layer: match lora.layer() {
            LoraLayer::Linear => "linear",
            LoraLayer::Embedding => "embedding",
        },
        rank: lora.rank(),
        scaling: lora.scaling(),
        in_features: lora.in_features(),
        out_features: lora.out_features(),
        dtypes: lora.dtypes().map(|dtype| dtype.to_string()),
    }
}

fn alone(adapter: &Adapter, module: &AdapterModule) -> Vec<RowOutput> {
    let tokens = adapter.module_metadata(module.path()).tokens.unwrap_or_default();
    let mut tokens = tokens.into_iter();
    let rows = module.token_ids().into_iter().zip(module.rows().row_norms());
    let rows = rows.map(|(id, norm)| RowOutput::Alone {
        token_id: id.0,
        token: tokens.next(),
        norm,
    });
    rows.collect()
}

/// The rows beside those of the model.
fn compared(adapter: &Adapter, module: &AdapterModule, base: &Checkpoint) -> Result<Vec<RowOutput>> {
    let table = adapter.table(module.path(), base)?;
    let ids = module.token_ids();
    let tokens = adapter.module_metadata(module.path()).tokens.unwrap_or_default();
    let recorded: BTreeMap<u32, String> = ids.iter().map(|id| id.0).zip(tokens).collect();
    let vocabulary = Vocabulary::of_model(base.dir());
    let string = |id: u32| match recorded.get(&id) {
        Some(token) => Ok(Some(token.clone())),
        None if vocabulary.exists() => Ok(vocabulary.token(id)?),
        None => Ok(None),
    };
    let rows = row_reports(&table, &ids, &table.read_rows(&ids)?, module.rows(), string)?;
    Ok(rows.into_iter().map(RowOutput::Compared).collect())
}

fn safetensors(path: &Path) -> Result<Output> {
    let file = SafetensorsFile::open(path)?;
    let tensors = file
        .names()
        .map(|name| Ok(tensor(&file.tensor(name)?)))
        .collect::<Result<_>>()?;
    Ok(Output::Safetensors {
        tensors,
        metadata: serde_json::to_value(file.metadata())?,
    })
}

fn tensor(tensor: &trainable_tokens_format::TensorRef<'_>) -> TensorOutput {
    TensorOutput {
        name: tensor.name.to_owned(),
        dtype: format!("{:?}", tensor.dtype),
        shape: tensor.shape.to_vec(),
        bytes: tensor.bytes.len(),
    }
}

fn model(dir: &Path) -> Result<ModelOutput> {
    let model = Model::open(dir)?;
    let table = model.table()?;
    let Model {
        checkpoint,
        config,
        vocabulary,
        ..
    } = model;
    let free_rows = if vocabulary.exists() {
        Some(free_rows(&vocabulary, table.vocab_size())?)
    } else {
        None
    };
    Ok(ModelOutput {
        model_type: config.model_type().to_owned(),
        vocab_size: table.vocab_size(),
        embedding_dim: table.embedding_dim(),
        dtype: table.dtype().to_string(),
        digest: table.digest().to_string(),
        tie_word_embeddings: config.tie_word_embeddings(),
        head: config.head_module(&checkpoint),
        pad_token_id: config.input_spec().pad_token_id,
        table_bytes: table.bytes().len(),
        free_rows,
        tensors: checkpoint
            .names()
            .map(|name| Ok(tensor(&checkpoint.tensor(name)?)))
            .collect::<Result<_>>()?,
    })
}

fn free_rows(vocabulary: &Vocabulary, vocab_size: usize) -> Result<Vec<u32>> {
    let mut free = Vec::new();
    for id in 0..u32::try_from(vocab_size)? {
        if vocabulary.token(id)?.is_none() {
            free.push(id);
        }
    }
    Ok(free)
}

fn to_text(output: &Output) -> String {
    match output {
        Output::Adapter(adapter) => adapter_text(adapter),
        Output::Adapters { adapters } => adapters.iter().fold(String::new(), |text, (name, adapter)| {
            text + &format!("{name}: {}", adapter_text(adapter))
        }),
        Output::Safetensors { tensors, metadata } => {
            tensors_text(tensors) + &format!("metadata {metadata}\n")
        }
        Output::Model(model) => model_text(model),
    }
}

fn adapter_text(adapter: &AdapterOutput) -> String {
    let mut text = format!("adapter, {}\n", bytes(adapter.bytes));
    let optional = [
        ("base model", adapter.base_model_name_or_path.clone()),
        ("base digest", adapter.base_digest.clone()),
        (
            "vocabulary",
            adapter.vocab_size.map(|size| format!("{size} rows")),
        ),
        ("init", adapter.init.clone()),
        ("peft version", adapter.peft_version.clone()),
    ];
    for (name, value) in optional {
        text += &value.map_or_else(String::new, |value| format!("  {name:<14} {value}\n"));
    }
    for module in &adapter.modules {
        text += &format!("module {}: {} {:?}", module.module, module.dtype, module.shape);
        text += &if module.tied.is_empty() {
            "\n".to_owned()
        } else {
            format!(", tied: {}\n", module.tied.join(", "))
        };
        text += &rows_text(&module.rows);
    }
    if let Some(reason) = &adapter.unsupported {
        text += &format!("cannot be merged: {reason}\n");
    }
    for lora in &adapter.lora {
        text += &format!(
            "LoRA {}: rank {}, scaling {}, {} inputs, {} outputs\n",
            lora.module, lora.rank, lora.scaling, lora.in_features, lora.out_features
        );
    }
    adapter
        .extra_tensors
        .iter()
        .for_each(|name| text += &format!("other tensor {name}\n"));
    text
}

fn rows_text(rows: &[RowOutput]) -> String {
    let (mut compared, mut alone) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            RowOutput::Compared(report) => compared.push(report.clone()),
            RowOutput::Alone {
                token_id,
                token,
                norm,
            } => alone.push(vec![
                token_id.to_string(),
                token
                    .as_ref()
                    .map_or_else(String::new, |token| format!("{token:?}")),
                format!("{norm:.4}"),
            ]),
        }
    }
    if compared.is_empty() {
        return text_table(&["#id", "token", "#norm"], alone);
    }
    rows_table(&compared)
}

fn model_text(model: &ModelOutput) -> String {
    let head = match (&model.head, model.tie_word_embeddings) {
        (None, _) => "no head",
        (Some(_), true) => "head tied to it",
        (Some(_), false) => "head untied",
    };
    let mut text = format!(
        "model of type {}\n  table          {} [{}, {}], {}; {head}\n  digest         {}\n",
        model.model_type,
        model.dtype,
        model.vocab_size,
        model.embedding_dim,
        bytes(model.table_bytes as u64),
        model.digest
    );
    if let Some(free) = &model.free_rows {
        let shown: Vec<String> = free.iter().take(16).map(ToString::to_string).collect();
        let more = if free.len() > shown.len() { ", …" } else { "" };
        text += &format!("  free rows      {} {}{more}\n", free.len(), shown.join(", "));
    }
    text + &tensors_text(&model.tensors)
}

fn tensors_text(tensors: &[TensorOutput]) -> String {
    let rows = tensors.iter().map(|tensor| {
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        vec![
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("[{}]", shape.join(", ")),
            bytes(tensor.bytes as u64),
        ]
    });
    text_table(&["tensor", "type", "shape", "#size"], rows)
}

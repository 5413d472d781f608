//! `inspect`: what an adapter, a safetensors file or a model directory holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::{EmbeddingSource, TokenId};
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint, LoraLayer, LoraWeights, SafetensorsFile};

use super::adapters_in;
use crate::args::{Cli, InspectArgs};
use crate::model::Model;
use crate::output::{bytes, print};

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

#[derive(Serialize)]
struct RowOutput {
    token_id: u32,
    token: Option<String>,
    norm: f64,
    /// Distance from the base row, where a model was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    drift: Option<f64>,
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
        safetensors(path)?
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
        adapter.check_against(base, BaseCheck::Fits)?;
        adapter.lora_deltas(base)?;
    }
    let config = adapter.config();
    let metadata = adapter.metadata();
    let module = |module: &trainable_tokens_format::AdapterModule| -> Result<ModuleOutput> {
        let table = base
            .as_ref()
            .map(|base| adapter.table(module.path(), base))
            .transpose()?;
        let ids = module.token_ids();
        let drift = table
            .map(|table| drift(module.rows(), &table.read_rows(&ids)?))
            .transpose()?;
        let tokens = adapter.module_metadata(module.path()).tokens;
        let row = |(slot, (id, norm)): (usize, (&TokenId, f64))| RowOutput {
            token_id: id.0,
            token: tokens.as_ref().and_then(|tokens| tokens.get(slot).cloned()),
            norm,
            drift: drift.as_ref().and_then(|drift| drift.get(slot).copied()),
        };
        Ok(ModuleOutput {
            module: module.path().to_owned(),
            tied: module.tied_paths().to_vec(),
            dtype: module.rows().dtype().to_string(),
            shape: module.rows().shape(),
            rows: ids
                .iter()
                .zip(module.rows().row_norms())
                .enumerate()
                .map(row)
                .collect(),
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

/// The L2 distance of each row from the base's.
fn drift(
    rows: &trainable_tokens_core::TokenRows,
    base: &trainable_tokens_core::TokenRows,
) -> Result<Vec<f64>> {
    let differences = rows
        .to_f64_vec()
        .into_iter()
        .zip(base.to_f64_vec())
        .map(|(row, base)| row - base)
        .collect();
    Ok(
        trainable_tokens_core::TokenRows::new::<f64>(differences, rows.num_rows(), rows.embedding_dim())?
            .row_norms(),
    )
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
        pad_token_id: config.input_spec().pad_token_id,
        table_bytes: table.bytes().len(),
        free_rows,
        tensors: checkpoint
            .names()
            .map(|name| Ok(tensor(&checkpoint.tensor(name)?)))
            .collect::<Result<_>>()?,
    })
}

fn free_rows(vocabulary: &trainable_tokens_trainer::Vocabulary, vocab_size: usize) -> Result<Vec<u32>> {
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
            tensors.iter().map(tensor_text).collect::<String>() + &format!("metadata {metadata}\n")
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
        for row in &module.rows {
            let token = row
                .token
                .as_deref()
                .map_or_else(String::new, |token| format!("'{token}'"));
            let drift = row
                .drift
                .map_or_else(String::new, |drift| format!("  drift {drift:.4}"));
            text += &format!("  {:>8} {token:<20} norm {:.4}{drift}\n", row.token_id, row.norm);
        }
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

fn model_text(model: &ModelOutput) -> String {
    let head = if model.tie_word_embeddings {
        "tied to it"
    } else {
        "untied"
    };
    let mut text = format!(
        "model of type {}\n  table          {} [{}, {}], {}; head {head}\n  digest         {}\n",
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
    text + &model.tensors.iter().map(tensor_text).collect::<String>()
}

fn tensor_text(tensor: &TensorOutput) -> String {
    format!("  {:<60} {:<5} {:?}\n", tensor.name, tensor.dtype, tensor.shape)
}

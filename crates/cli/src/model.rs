//! Models and adapters, opened the same way by every command.

use std::cell::OnceCell;
use std::path::Path;

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use trainable_tokens_core::{EmbeddingSource, PaddingRule, TokenRows, TokenSet};
use trainable_tokens_format::{
    self as format, Adapter, AdapterBuilder, BaseCheck, Checkpoint, MappedTable, TableDigest,
};
use trainable_tokens_trainer::{self as trainer, Architecture, LanguageModel, Vocabulary};

use crate::args::{ComputeArgs, DeviceArg, WeightType};
use crate::initial::Initial;

/// A model directory, its files checked but no weight read.
pub(crate) struct Model {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) config: Architecture,
    /// The path of the embedding module, as PEFT names it.
    pub(crate) embedding_module: String,
    pub(crate) vocabulary: Vocabulary,
    /// Computed once, however often a run saves: it reads the whole table.
    digest: OnceCell<TableDigest>,
}

impl Model {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            bail!("model {} is not a directory", dir.display());
        }
        let config = dir.join("config.json");
        if !config.exists() {
            bail!(
                "{} does not exist; a model directory holds it beside its weights",
                config.display()
            );
        }
        let config = Architecture::read(&config)?;
        let checkpoint = Checkpoint::open(dir)?;
        Ok(Self {
            embedding_module: config.embedding_module(&checkpoint),
            checkpoint,
            config,
            vocabulary: Vocabulary::of_model(dir),
            digest: OnceCell::new(),
        })
    }

    /// The embedding table, mapped.
    pub(crate) fn table(&self) -> Result<MappedTable> {
        let tensor = format!("{}.weight", self.embedding_module);
        Ok(self.checkpoint.table(&tensor)?)
    }

    /// Loads the model, with an adapter if there is one. Whether the adapter fits is asked before any weight is read, and
    /// whether the model is the one that it was trained on, which takes reading the whole table, when it is loaded.
    pub(crate) fn load(&self, adapter: Option<&Path>, compute: ComputeArgs) -> Result<LanguageModel> {
        let padding = PaddingRule::NoLookupGradient;
        let Some(dir) = adapter else {
            return self.load_rows(&[], None, padding, compute);
        };
        let adapter = Adapter::read(dir)?;
        let fits = adapter.check_against(&self.checkpoint, BaseCheck::Fits);
        fits.map_err(|error| misfit(dir, error))?;
        let loaded = self.load_adapter(&adapter, padding, compute);
        loaded.map_err(|error| misfit(dir, error))
    }

    /// Loads the model with all of an adapter.
    pub(crate) fn load_adapter(
        &self,
        adapter: &Adapter,
        padding: PaddingRule,
        compute: ComputeArgs,
    ) -> Result<LanguageModel> {
        let (dtype, device) = (weight_type(compute), open_device(compute.device)?);
        Ok(LanguageModel::load_adapter(
            &self.checkpoint,
            adapter,
            padding,
            dtype,
            &device,
        )?)
    }

    /// Loads the model with the rows of `ids` trainable, starting from `rows` or as they are.
    pub(crate) fn load_rows(
        &self,
        ids: &[u32],
        rows: Option<&TokenRows>,
        padding: PaddingRule,
        compute: ComputeArgs,
    ) -> Result<LanguageModel> {
        let (dtype, device) = (weight_type(compute), open_device(compute.device)?);
        Ok(LanguageModel::load(
            &self.checkpoint,
            ids,
            rows,
            padding,
            dtype,
            &device,
        )?)
    }

    /// Starts the adapter of rows of this model, with all that makes it tell its own story.
    pub(crate) fn adapter_builder(
        &self,
        dir: &Path,
        ids: &[u32],
        rows: TokenRows,
        initial: &Initial,
    ) -> Result<AdapterBuilder> {
        let table = self.table()?;
        let tokens = TokenSet::new(ids.iter().copied(), table.vocab_size())?;
        let mut builder = Adapter::builder(self.embedding_module.as_str(), &tokens, rows)
            .base_model_name_or_path(dir.to_string_lossy())
            .base(*self.digest.get_or_init(|| table.digest()), table.dtype())
            .init_weights(initial.keeps_base())
            .init(initial.text.as_str());
        // PEFT would take an encoder for a model that generates.
        if let Architecture::Encoder(_) = self.config {
            builder = builder.task_type(None);
        }
        if let Some(head) = self.config.tied_head(&self.checkpoint) {
            builder = builder.tied(head);
        }
        if let Some(strings) = self.token_strings(ids)? {
            builder = builder.tokens(strings);
        }
        Ok(builder)
    }

    /// The strings of tokens, if the model has a tokenizer that knows them all.
    pub(crate) fn token_strings(&self, ids: &[u32]) -> Result<Option<Vec<String>>> {
        if !self.vocabulary.exists() {
            return Ok(None);
        }
        let strings = ids.iter().map(|id| Ok(self.vocabulary.token(*id)?));
        strings.collect::<Result<Option<Vec<String>>>>()
    }
}

/// An error about the adapter in `dir`; where it does not fit a model, with both named.
pub(crate) fn misfit(dir: &Path, error: impl Into<anyhow::Error>) -> anyhow::Error {
    let error = error.into();
    let found = match error.downcast_ref() {
        Some(trainer::Error::Format(found)) => Some(found),
        _ => error.downcast_ref(),
    };
    match found {
        Some(format::Error::Base { path, reason, .. }) => {
            let (dir, model) = (dir.display(), path.display());
            let message = format!("adapter {dir} does not fit model {model}: {reason}");
            error.context(message)
        }
        _ => error,
    }
}

fn weight_type(compute: ComputeArgs) -> DType {
    match compute.dtype {
        WeightType::F32 => DType::F32,
        WeightType::Bf16 => DType::BF16,
    }
}

fn open_device(device: DeviceArg) -> Result<Device> {
    Ok(match device {
        DeviceArg::Cpu => Device::Cpu,
        DeviceArg::Cuda(_) if !candle_core::utils::cuda_is_available() => {
            bail!("this program was built without CUDA; build it with --features cuda, or use --device cpu")
        }
        DeviceArg::Cuda(number) => Device::new_cuda(number)?,
        DeviceArg::Metal if !candle_core::utils::metal_is_available() => {
            bail!("this program was built without Metal; build it with --features metal, or use --device cpu")
        }
        DeviceArg::Metal => Device::new_metal(0)?,
    })
}

//! How LoRA's weights start beside rows of tokens.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use trainable_tokens_core::{EmbeddingSource, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterBuilder, AdapterConfig, Checkpoint, TargetModules, TokenIndices, is_path_or_suffix,
};

use crate::architecture::LinearLayers;
use crate::config::WeightLayout;
use crate::{Architecture, Error, LanguageModel, Result};

/// The word for all linear layers of the model but its output layer, as in PEFT.
pub const ALL_LINEAR: &str = "all-linear";

/// Weights of LoRA that train beside rows of tokens (Hu et al. 2021), named as in PEFT's `LoraConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    /// `r`: rows of `A`, columns of `B`.
    pub rank: usize,
    /// `lora_alpha`: the product is multiplied by `alpha / r`.
    pub alpha: f64,
    /// `use_rslora`: by `alpha / sqrt(r)` instead (Kalajdzievski 2023).
    pub rank_stabilized: bool,
    /// Layers by path, or by the end of it after a dot; [`ALL_LINEAR`] stands for all but the output layer. None for PEFT's
    /// choice: the projections to queries and values.
    pub targets: Vec<String>,
    /// Seed of the factors `A`.
    pub seed: u64,
}

impl Default for LoraOptions {
    /// PEFT's rank and alpha, 8 each, and its targets.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            rank_stabilized: false,
            targets: Vec::new(),
            seed: 0,
        }
    }
}

impl LoraOptions {
    /// The config that PEFT reads, for layers of the model of a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a rank of 0, an alpha that is not a finite number, or no target; those of
    /// [`Architecture::read`].
    pub fn config(&self, checkpoint: &Checkpoint) -> Result<AdapterConfig> {
        self.config_for(&linear_layers(checkpoint)?)
    }

    fn config_for(&self, layers: &LinearLayers) -> Result<AdapterConfig> {
        if self.rank == 0 || !self.alpha.is_finite() {
            let message = format!(
                "LoRA's rank is {} and its alpha {}: a rank above 0 and a finite alpha are needed",
                self.rank, self.alpha
            );
            return Err(Error::Setting(message));
        }
        // PEFT corrects this field by the class of a layer, and warns.
        let fan_in_fan_out = layers.layout == WeightLayout::InOut;
        Ok(AdapterConfig::lora(&TokenIndices::ByModule(BTreeMap::new()))?
            .with_field("fan_in_fan_out", &json!(fan_in_fan_out))?
            .with_field("r", &json!(self.rank))?
            .with_field("lora_alpha", &number(self.alpha))?
            .with_field("use_rslora", &json!(self.rank_stabilized))?
            .with_target_modules(&TargetModules::List(self.targets_in(layers)?))?)
    }

    /// The targets, spelled out. One that is the end of several layers' names is written as these: modules that the model
    /// does not compute with may have the same end.
    fn targets_in(&self, layers: &LinearLayers) -> Result<Vec<String>> {
        let mut targets: Vec<String> = Vec::new();
        let mut add = |name: &str| {
            if !name.is_empty() && !targets.iter().any(|target| target == name) {
                targets.push(name.to_owned());
            }
        };
        for target in &self.targets {
            let all = target == ALL_LINEAR;
            let mut named = layers
                .names
                .iter()
                .filter(|name| all || is_path_or_suffix(target, name))
                .peekable();
            if named.peek().is_none() {
                add(target);
            }
            named.for_each(|name| add(name));
        }
        if self.targets.is_empty() {
            layers.preferred.iter().for_each(|name| add(name));
        }
        if targets.is_empty() {
            return Err(Error::Setting(
                "LoRA has no target: name a linear layer".to_owned(),
            ));
        }
        Ok(targets)
    }

    /// An adapter that changes nothing but by its rows: each `B` is 0, each `A` uniform between `±1/sqrt(in)`, as PEFT starts
    /// them. Rows that are not given are the checkpoint's own.
    ///
    /// # Errors
    ///
    /// Those of [`config`](Self::config); [`Error::Setting`] if a target is no linear layer of the model;
    /// [`Error::Format`] for tokens and rows that do not fit.
    pub fn start(
        &self,
        checkpoint: &Checkpoint,
        tokens: &[u32],
        rows: Option<&TokenRows>,
    ) -> Result<Adapter> {
        let architecture = Architecture::read(&checkpoint.config_path())?;
        let layers = architecture.linear_layers(checkpoint);
        let config = self.config_for(&layers)?;
        let embedding = architecture.embedding_module(checkpoint);
        let table = checkpoint.table(&format!("{embedding}.weight"))?;
        let tokens = TokenSet::new(tokens.iter().copied(), table.vocab_size())?;
        let rows = match rows {
            Some(rows) => rows.clone(),
            None => table.read_rows(tokens.ids())?,
        };
        let modules = config.lora_modules(checkpoint)?;
        self.expect_layers(&modules, &layers)?;
        let mut builder = Adapter::builder(embedding, &tokens, rows).lora(config);
        for (stream, module) in (0..).zip(&modules) {
            let weight = checkpoint.table(&format!("{module}.weight"))?;
            let (mut outputs, mut inputs) = (weight.vocab_size(), weight.embedding_dim());
            if Some(module) != layers.head.as_ref() && layers.layout == WeightLayout::InOut {
                (outputs, inputs) = (inputs, outputs);
            }
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(stream);
            let bound = 1.0 / (inputs as f32).sqrt();
            let a = (0..self.rank * inputs)
                .map(|_| random.random_range(-bound..=bound))
                .collect();
            let a = TokenRows::new::<f32>(a, self.rank, inputs)?;
            let b = TokenRows::new(vec![0f32; outputs * self.rank], outputs, self.rank)?;
            builder = builder.lora_linear(module, &a, &b);
        }
        Ok(builder.build()?)
    }

    /// Every target must be a linear layer, and what is targeted must be of the model.
    fn expect_layers(&self, modules: &[String], layers: &LinearLayers) -> Result<()> {
        let refuse = |message: String| Err(Error::Setting(message));
        let is_named = |target: &str, module: &str| is_path_or_suffix(target, module);
        for target in self.targets.iter().filter(|target| *target != ALL_LINEAR) {
            if !modules.iter().any(|module| is_named(target, module)) {
                let head = layers.head.as_deref().filter(|_| !layers.ties_head);
                let names = layers.names.iter().copied().chain(head);
                let names = names.collect::<Vec<_>>().join(", ");
                return refuse(format!(
                    "no linear layer is named '{target}': LoRA's targets can be {names} or {ALL_LINEAR}"
                ));
            }
        }
        let is_layer = |module: &&String| layers.names.iter().any(|name| is_named(name, module));
        match modules.iter().find(|module| !is_layer(module)) {
            Some(module) if Some(module) != layers.head.as_ref() => refuse(format!(
                "module {module} is no linear layer of the model, so that LoRA cannot train beside it"
            )),
            Some(head) if layers.ties_head => refuse(format!(
                "{head} shares the table of the input embedding, so that LoRA cannot train beside it"
            )),
            _ => Ok(()),
        }
    }
}

fn linear_layers(checkpoint: &Checkpoint) -> Result<LinearLayers> {
    Ok(Architecture::read(&checkpoint.config_path())?.linear_layers(checkpoint))
}

/// A whole number without a fraction, as PEFT writes it.
#[allow(clippy::cast_possible_truncation)]
fn number(value: f64) -> serde_json::Value {
    let whole = value as i64;
    if whole as f64 == value {
        json!(whole)
    } else {
        json!(value)
    }
}

impl LanguageModel {
    /// Adds the model's weights of LoRA, as they are now, to an adapter that is being made.
    ///
    /// # Errors
    ///
    /// Candle's errors.
    pub fn add_low_rank(&self, builder: AdapterBuilder) -> Result<AdapterBuilder> {
        self.low_rank().iter().try_fold(builder, |builder, low_rank| {
            let [a, b] = low_rank.read()?;
            Ok(builder.lora_linear(low_rank.path(), &a, &b))
        })
    }
}

//! How LoRA's weights start beside rows of tokens.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use trainable_tokens_core::{EmbeddingSource, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterBuilder, AdapterConfig, Checkpoint, TargetModules, TokenIndices, is_path_or_suffix,
};

use crate::config::WeightLayout;
use crate::{Error, LanguageModel, ModelConfig, Result};

/// The word for all linear layers of the decoder but the head, as in PEFT.
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
    /// Layers by path, or by the end of it after a dot; [`ALL_LINEAR`] stands for all but the head. None for PEFT's choice:
    /// the projections to queries and values.
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
    /// The config that PEFT reads, for layers of `model`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a rank of 0, an alpha that is not a finite number, or no target.
    pub fn config(&self, model: &ModelConfig) -> Result<AdapterConfig> {
        if self.rank == 0 || !self.alpha.is_finite() {
            let message = format!(
                "LoRA's rank is {} and its alpha {}: a rank above 0 and a finite alpha are needed",
                self.rank, self.alpha
            );
            return Err(Error::Setting(message));
        }
        let names = self.targets.iter().flat_map(|target| match target.as_str() {
            ALL_LINEAR => model.linear_layers(),
            name => vec![name],
        });
        let mut targets: Vec<String> = Vec::new();
        for name in names.filter(|name| !name.is_empty()) {
            if !targets.iter().any(|target| target == name) {
                targets.push(name.to_owned());
            }
        }
        if self.targets.is_empty() {
            targets = model.lora_targets().into_iter().map(str::to_owned).collect();
        }
        if targets.is_empty() {
            return Err(Error::Setting(
                "LoRA has no target: name a linear layer".to_owned(),
            ));
        }
        // PEFT corrects this field by the class of a layer, and warns.
        let fan_in_fan_out = model.names.layer.layout == WeightLayout::InOut;
        Ok(AdapterConfig::lora(&TokenIndices::ByModule(BTreeMap::new()))?
            .with_field("fan_in_fan_out", &json!(fan_in_fan_out))?
            .with_field("r", &json!(self.rank))?
            .with_field("lora_alpha", &number(self.alpha))?
            .with_field("use_rslora", &json!(self.rank_stabilized))?
            .with_target_modules(&TargetModules::List(targets))?)
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
        let model = ModelConfig::read(&checkpoint.config_path())?;
        let config = self.config(&model)?;
        let table = checkpoint.table(&model.embedding_tensor())?;
        let tokens = TokenSet::new(tokens.iter().copied(), table.vocab_size())?;
        let rows = match rows {
            Some(rows) => rows.clone(),
            None => table.read_rows(tokens.ids())?,
        };
        let modules = config.lora_modules(checkpoint)?;
        self.expect_layers(&modules, &model)?;
        let mut builder = Adapter::builder(model.embedding_module(), &tokens, rows).lora(config);
        for (stream, module) in (0..).zip(&modules) {
            let weight = checkpoint.table(&format!("{module}.weight"))?;
            let (mut outputs, mut inputs) = (weight.vocab_size(), weight.embedding_dim());
            if module != model.head_module() && model.names.layer.layout == WeightLayout::InOut {
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

    /// Every target must be a linear layer, and what is targeted must be of the decoder.
    fn expect_layers(&self, modules: &[String], model: &ModelConfig) -> Result<()> {
        let (linear, head) = (model.linear_layers(), model.head_module());
        let refuse = |message: String| Err(Error::Setting(message));
        for target in self.targets.iter().filter(|target| *target != ALL_LINEAR) {
            if !modules.iter().any(|module| is_path_or_suffix(target, module)) {
                return refuse(format!(
                    "no linear layer is named '{target}': LoRA's targets can be {}, {head} or {ALL_LINEAR}",
                    linear.join(", ")
                ));
            }
        }
        let is_layer = |module: &&String| linear.iter().any(|name| is_path_or_suffix(name, module));
        match modules.iter().find(|module| !is_layer(module)) {
            Some(module) if module != head => refuse(format!(
                "module {module} is no linear layer, so that LoRA cannot train beside it"
            )),
            Some(_) if model.tie_word_embeddings => refuse(format!(
                "{head} shares the table of the input embedding, so that LoRA cannot train beside it"
            )),
            _ => Ok(()),
        }
    }
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

//! Encoders of the BERT family, differentiable everywhere, frozen but for the trainable tokens.

mod embeddings;
mod layer;
mod names;
mod pooling;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::{FrozenLinear, TrainableTokens};
use trainable_tokens_core::{
    CrossEntropyOptions, EmbeddingSource, LayerOptions, LogitsChunk, PaddingRule, TokenRows,
};
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint};

use self::embeddings::Embeddings;
use self::layer::Layer;
pub(crate) use self::names::Names;
pub use self::pooling::{Pooling, PoolingMode};
use super::head::Head;
use super::linear::Linear;
use super::load::{adapter_rows, embedding, low_rank, padding as padding_of, table_and_rows};
use super::weights::Weights;
use super::{LowRank, through};
use crate::config::WeightLayout;
use crate::ops::{Norm, activate};
use crate::{Activation, EncoderConfig, Error, Graph, Result};

/// An encoder of the BERT family (Devlin et al. 2018; Liu et al. 2019) of which only the rows of some tokens train, and
/// weights of LoRA where an adapter has some. Every token sees all others of its text.
///
/// It has a head of masked language modelling where its checkpoint has one. As in a [`Decoder`](crate::Decoder), a
/// backward pass makes gradients of activations and of what trains, never of a frozen weight.
#[derive(Debug)]
pub struct Encoder {
    config: EncoderConfig,
    names: Names,
    embedding: TrainableTokens,
    embeddings: Embeddings,
    layers: Vec<Arc<Layer>>,
    head: Option<MaskedHead>,
    low_rank: Vec<LowRank>,
    num_parameters: usize,
    recomputes: bool,
    logits_chunk: LogitsChunk,
    device: Device,
}

/// A head of masked language modelling: a dense layer, a norm, and the output layer with its bias.
#[derive(Debug)]
struct MaskedHead {
    dense: Linear,
    norm: Norm,
    output: Head,
}

impl Encoder {
    /// Loads a checkpoint, its weights converted to `dtype` on `device`, with the rows of `tokens` trainable.
    ///
    /// The rows start as `rows`, `[k, D]` in slot order, or else as the checkpoint's own. `padding` is the rule for
    /// the config's `pad_token_id`, should it be among the tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] and [`Error::UnsupportedModel`]; [`Error::Format`] for a tensor that is missing or does not
    /// have the config's shape; a token out of range; candle's errors.
    pub fn load(
        checkpoint: &Checkpoint,
        tokens: &[u32],
        rows: Option<&TokenRows>,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = EncoderConfig::read(&checkpoint.config_path())?;
        Self::load_as(config, checkpoint, tokens, rows, padding, dtype, device)
    }

    /// [`load`](Self::load) with a configuration that was read before.
    pub(crate) fn load_as(
        config: EncoderConfig,
        checkpoint: &Checkpoint,
        tokens: &[u32],
        rows: Option<&TokenRows>,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let names = Names::of(&config, checkpoint);
        let weights = Weights::new(checkpoint, dtype, device);
        let tensor = format!("{}.weight", names.embedding());
        let shape = [config.vocab_size, config.hidden_size];
        let (table, tokens, rows) = table_and_rows(&weights, checkpoint, (&tensor, shape), tokens, rows)?;
        let embedding = embedding(table, &tokens, &rows, options(&config, padding))?;
        Self::build(config, names, &weights, embedding)
    }

    /// Loads a checkpoint with an adapter: its rows for the input embedding, and its weights of LoRA for linear layers, all
    /// trainable.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load); [`Error::Format`] if the adapter does not fit; [`Error::Setting`] for rows or weights
    /// of LoRA of another module, or rows beyond the checkpoint's vocabulary, which only merging applies.
    pub fn load_adapter(
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = EncoderConfig::read(&checkpoint.config_path())?;
        Self::load_adapter_as(config, checkpoint, adapter, padding, dtype, device)
    }

    /// [`load_adapter`](Self::load_adapter) with a configuration that was read before.
    pub(crate) fn load_adapter_as(
        config: EncoderConfig,
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let checkpoint = &checkpoint.named_for(adapter)?;
        let names = Names::of(&config, checkpoint);
        adapter.check_against(checkpoint, BaseCheck::SameTable)?;
        let low_rank = low_rank(checkpoint, adapter, device)?;
        // PEFT's `all-linear` has some for the pooler of a bare encoder, which nothing here is computed with.
        let pooler = names.module("pooler.dense");
        let low_rank = low_rank.into_iter().filter(|weights| weights.path() != pooler);
        let weights = Weights::new(checkpoint, dtype, device).with_low_rank(low_rank);
        let module = names.embedding();
        let tensor = format!("{module}.weight");
        weights.expect_shape(&tensor, &[config.vocab_size, config.hidden_size])?;
        let decoder = names.head().filter(|_| config.tie_word_embeddings);
        let decoder = decoder.map(|head| head.decoder);
        let is_placed = |path: &str| path == module || Some(path) == decoder;
        if let Some(other) = adapter.modules().iter().find(|other| !is_placed(other.path())) {
            return Err(Error::Setting(format!(
                "the adapter has rows for {}, which is not the input embedding {module}; `merge` applies them",
                other.path()
            )));
        }
        let table = adapter.table(&module, checkpoint)?;
        if table.vocab_size() > config.vocab_size {
            return Err(Error::Setting(format!(
                "the adapter has {} tokens, the encoder {}, whose head has no bias for the others; `merge` applies them",
                table.vocab_size(),
                config.vocab_size
            )));
        }
        let (tokens, rows) = adapter_rows(adapter, &module, &table)?;
        let table = weights.table(&table)?;
        let embedding = embedding(table, &tokens, &rows, options(&config, padding))?;
        Self::build(config, names, &weights, embedding)
    }

    fn build(
        config: EncoderConfig,
        names: Names,
        weights: &Weights<'_>,
        embedding: TrainableTokens,
    ) -> Result<Self> {
        let layer = |index: usize| {
            let module = names.module(&format!("encoder.layer.{index}"));
            Layer::load(weights, &config, &module).map(Arc::new)
        };
        let layers = (0..config.num_hidden_layers)
            .map(layer)
            .collect::<Result<Vec<_>>>()?;
        let embeddings = Embeddings::load(weights, &config, &names.module("embeddings"))?;
        let head = MaskedHead::load(weights, &config, &names, &embedding)?;
        weights.expect_all_taken()?;
        let device = embedding.table().tensor().device().clone();
        Ok(Self {
            embedding,
            embeddings,
            layers,
            head,
            low_rank: weights.low_rank(),
            num_parameters: weights.num_parameters(),
            recomputes: false,
            logits_chunk: LogitsChunk::default(),
            device,
            config,
            names,
        })
    }

    /// Sets whether the activations of a layer are computed again in the backward pass instead of kept; see
    /// [`Decoder::with_recomputation`](crate::Decoder::with_recomputation).
    #[must_use]
    pub fn with_recomputation(mut self, recomputes: bool) -> Self {
        self.recomputes = recomputes;
        self
    }

    /// Sets how many rows of logits exist at once in a loss.
    #[must_use]
    pub fn with_logits_chunk(mut self, chunk: LogitsChunk) -> Self {
        self.logits_chunk = chunk;
        self
    }

    /// The model's configuration.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The path of the embedding module, as PEFT's files and `target_modules` spell it.
    pub fn embedding_module(&self) -> String {
        self.names.embedding()
    }

    /// Weights of LoRA in the head of masked language modelling.
    pub(crate) fn low_rank_of_head(&self) -> Option<&LowRank> {
        self.low_rank
            .iter()
            .find(|weights| self.names.is_of_head(weights.path()))
    }

    /// Whether the checkpoint has a head of masked language modelling.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// The embedding, whose rows train.
    pub fn embedding(&self) -> &TrainableTokens {
        &self.embedding
    }

    /// The embedding, to step its rows.
    pub fn embedding_mut(&mut self) -> &mut TrainableTokens {
        &mut self.embedding
    }

    /// The weights of LoRA, in the order of the layers.
    pub fn low_rank(&self) -> &[LowRank] {
        &self.low_rank
    }

    /// Parameters loaded, frozen or not; a tied table counts once.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the module of word embeddings returns for `input_ids` `[B, L]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// A token out of range; candle's errors.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        Ok(self.embedding.forward(input_ids)?)
    }

    /// The last hidden states `[B, L, D]` of `embeddings` `[B, L, D]` of the tokens `input_ids` `[B, L]`. Of each row, only
    /// its first `lengths` tokens are seen, or all without lengths; the states of the others mean nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a sequence longer than the model's positions; candle's errors.
    pub fn hidden(
        &self,
        embeddings: &Tensor,
        input_ids: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let lengths: Option<Arc<[usize]>> = lengths.map(Arc::from);
        let hidden = self.embeddings.forward(embeddings, input_ids)?;
        let forward = move |layer: &Layer, x: &Tensor| layer.forward(x, lengths.as_ref());
        let leaves = |layer: &Layer| layer.leaves().cloned().collect();
        through(&self.layers, hidden, self.recomputes, leaves, forward)
    }

    /// The logits of hidden states `[.., D]`: `[.., V]`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the checkpoint has no head; candle's errors.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.expect_head()?;
        let hidden = head.transform(hidden, &self.config)?;
        head.output.logits(&hidden, None)
    }

    /// The mean cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`: the id that it must
    /// predict, or -100 for none. The logits are never held at once. Without a graph no gradient is prepared.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the checkpoint has no head; a label out of range, or no label; candle's errors.
    pub fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, graph: Graph) -> Result<Tensor> {
        let options = CrossEntropyOptions {
            chunk: self.logits_chunk,
            ..CrossEntropyOptions::default()
        };
        let head = self.expect_head()?;
        let hidden = head.transform(hidden, &self.config)?;
        head.output.cross_entropy(&hidden, labels, options, graph)
    }

    fn expect_head(&self) -> Result<&MaskedHead> {
        self.head.as_ref().ok_or_else(|| {
            Error::Setting(format!(
                "the checkpoint of this {} has no head of masked language modelling, so that it predicts no tokens; \
                 with sentences and definitions, its embeddings can be taught",
                self.config.model_type
            ))
        })
    }
}

fn options(config: &EncoderConfig, rule: PaddingRule) -> LayerOptions {
    LayerOptions {
        padding: padding_of(config.pad_token_id, rule),
        ..LayerOptions::default()
    }
}

impl MaskedHead {
    fn load(
        weights: &Weights<'_>,
        config: &EncoderConfig,
        names: &Names,
        embedding: &TrainableTokens,
    ) -> Result<Option<Self>> {
        let Some(names) = names.head() else {
            return Ok(None);
        };
        let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
        // An output layer that is not tied has a bias of its own; the other one is then of no use.
        let [shared, own] = names.bias;
        let is_own = weights.contains(own) && !(config.tie_word_embeddings && weights.contains(shared));
        let bias = weights.tensor(if is_own { own } else { shared }, &[vocab_size])?;
        let output = if config.tie_word_embeddings {
            Head::Tied(embedding.tied_head().with_bias(&bias)?)
        } else {
            let weight = weights.tensor(&format!("{}.weight", names.decoder), &[vocab_size, hidden_size])?;
            Head::Untied(weights.with_low_rank_of(names.decoder, FrozenLinear::new(weight, Some(bias))?))
        };
        Ok(Some(Self {
            dense: weights.linear(names.dense, [hidden_size, hidden_size], true, WeightLayout::OutIn)?,
            norm: layer::norm(weights, names.norm, config)?,
            output,
        }))
    }

    /// What the output layer reads.
    fn transform(&self, hidden: &Tensor, config: &EncoderConfig) -> Result<Tensor> {
        // RoBERTa's head has its own nonlinearity, whatever the layers have.
        let activation = if config.model_type == "bert" {
            config.hidden_act
        } else {
            Activation::Gelu
        };
        let hidden = activate(activation, &self.dense.forward(hidden)?)?;
        Ok(self.norm.forward(&hidden)?)
    }
}

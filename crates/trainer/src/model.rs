//! Decoders of the Llama family, differentiable everywhere, frozen but for the trainable tokens.

mod attention;
mod mlp;
mod rotary;
mod weights;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::{FrozenLinear, TiedHead, TrainableTokens};
use trainable_tokens_core::{
    CrossEntropyOptions, EmbeddingSource, LayerOptions, LogitsChunk, Padding, PaddingRule, TokenId,
    TokenRows, TokenSet,
};
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint};

use self::attention::Attention;
use self::mlp::Mlp;
use self::rotary::Rotary;
use self::weights::Weights;
use crate::ops::{Rotation, recompute, rms_norm};
use crate::{Error, Graph, ModelConfig, Result};

/// The name of the embedding module, as PEFT's files and `target_modules` spell it.
pub const EMBEDDING_MODULE: &str = "model.embed_tokens";
/// The name of the output layer's module.
pub const HEAD_MODULE: &str = "lm_head";
/// The tensor of the embedding table in a checkpoint.
pub const EMBEDDING_TENSOR: &str = "model.embed_tokens.weight";

/// A causal language model of which only the rows of some tokens train.
///
/// Every linear layer is a [`FrozenLinear`] and every norm's weight is captured: a backward pass makes gradients
/// of activations and of the trained rows, never of a frozen weight.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: TrainableTokens,
    layers: Vec<Arc<Layer>>,
    norm: Tensor,
    head: Head,
    rotary: Rotary,
    num_parameters: usize,
    recomputes: bool,
    logits_chunk: LogitsChunk,
}

#[derive(Debug)]
enum Head {
    Tied(TiedHead),
    Untied(FrozenLinear),
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    attention: Attention,
    post_attention_norm: Tensor,
    mlp: Mlp,
}

impl Decoder {
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
        let config = ModelConfig::read(&checkpoint.config_path())?;
        let weights = Weights::new(checkpoint, dtype, device);
        // The table first: it shows that the vocabulary, whose size a set of tokens takes in memory, is there.
        let table = weights.tensor(EMBEDDING_TENSOR, &[config.vocab_size, config.hidden_size])?;
        let tokens = TokenSet::new(tokens.iter().copied(), config.vocab_size)?;
        let rows = match rows {
            Some(rows) => rows.clone(),
            None => checkpoint.table(EMBEDDING_TENSOR)?.read_rows(tokens.ids())?,
        };
        let head =
            |weights: &Weights<'_>| weights.linear(HEAD_MODULE, config.vocab_size, config.hidden_size, false);
        Self::build(config.clone(), &weights, table, (&tokens, &rows), padding, head)
    }

    /// Loads a checkpoint with the rows of an adapter for its input embedding trainable. Where the adapter's vocabulary is
    /// larger than the checkpoint's, the table grows by the adapter's rows, and so does the head.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load); [`Error::Format`] if the adapter does not fit, naming the rows that are missing.
    pub fn load_adapter(
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut config = ModelConfig::read(&checkpoint.config_path())?;
        adapter.check_against(checkpoint, BaseCheck::SameTable)?;
        let weights = Weights::new(checkpoint, dtype, device);
        let shape = [config.vocab_size, config.hidden_size];
        weights.expect_shape(EMBEDDING_TENSOR, &shape)?;
        let table = adapter.table(EMBEDDING_MODULE, checkpoint)?;
        config.vocab_size = table.vocab_size();
        let (tokens, rows) = match adapter.module(EMBEDDING_MODULE) {
            Some(module) => (module.token_set(config.vocab_size)?, module.rows().clone()),
            None => (
                TokenSet::new([], config.vocab_size)?,
                TokenRows::zeros(table.dtype(), 0, config.hidden_size),
            ),
        };
        let table = weights.table(&table)?;
        let head = |weights: &Weights<'_>| {
            weights.expect_shape(&format!("{HEAD_MODULE}.weight"), &shape)?;
            let head = adapter.table(HEAD_MODULE, checkpoint)?;
            Ok(FrozenLinear::new(weights.table(&head)?, None)?)
        };
        Self::build(config, &weights, table, (&tokens, &rows), padding, head)
    }

    fn build(
        config: ModelConfig,
        weights: &Weights<'_>,
        table: Tensor,
        (tokens, rows): (&TokenSet, &TokenRows),
        padding: PaddingRule,
        untied_head: impl FnOnce(&Weights<'_>) -> Result<FrozenLinear>,
    ) -> Result<Self> {
        let padding = config.pad_token_id.map(|id| Padding {
            token: TokenId(id),
            rule: padding,
        });
        let row_dtype = rows.dtype().default_row_dtype();
        let embedding = TrainableTokens::with_rows(table, &tokens.to_vec(), &rows.to_dtype(row_dtype))?
            .with_options(LayerOptions {
                padding,
                ..LayerOptions::default()
            });
        let head = if config.tie_word_embeddings {
            Head::Tied(embedding.tied_head())
        } else {
            Head::Untied(untied_head(weights)?)
        };
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(weights, &config, index).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let norm = weights.tensor("model.norm.weight", &[config.hidden_size])?;
        let rotary = Rotary::new(&config);
        let num_parameters = weights.num_parameters();
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            rotary,
            num_parameters,
            recomputes: false,
            logits_chunk: LogitsChunk::default(),
        })
    }

    /// Sets whether the activations of a layer are computed again in the backward pass instead of kept. That costs
    /// another forward pass of the layers, but then only each layer's input is kept. The loss is the same.
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
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The embedding, whose rows train.
    pub fn embedding(&self) -> &TrainableTokens {
        &self.embedding
    }

    /// The embedding, to step its rows.
    pub fn embedding_mut(&mut self) -> &mut TrainableTokens {
        &mut self.embedding
    }

    /// Parameters of the model, the frozen ones included; a tied table counts once.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        self.norm.device()
    }

    /// What the embedding module returns for `input_ids` `[B, L]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// A token out of range; candle's errors.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        Ok(self.embedding.forward(input_ids)?)
    }

    /// The last hidden states, normed, of `embeddings` `[B, L, D]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a sequence longer than the model's positions; candle's errors.
    pub fn hidden(&self, embeddings: &Tensor) -> Result<Tensor> {
        let (_, length, _) = embeddings.dims3()?;
        let most = self.config.max_position_embeddings;
        if length > most {
            let message =
                format!("a sequence of {length} tokens is longer than the model's {most} positions");
            return Err(Error::Setting(message));
        }
        let rotation = self
            .rotary
            .rotation(length, embeddings.dtype(), embeddings.device())?;
        let mut hidden = embeddings.clone();
        for layer in &self.layers {
            hidden = if self.recomputes {
                let (layer, rotation, eps) = (layer.clone(), rotation.clone(), self.config.rms_norm_eps);
                let block =
                    move |x: &Tensor| layer.forward(x, &rotation, eps).map_err(candle_core::Error::wrap);
                recompute(&hidden, &[], Arc::new(block))?
            } else {
                layer.forward(&hidden, &rotation, self.config.rms_norm_eps)?
            };
        }
        Ok(rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)?)
    }

    /// The logits of hidden states `[.., D]`: `[.., V]`.
    ///
    /// # Errors
    ///
    /// Candle's errors.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(match &self.head {
            Head::Tied(head) => head.forward(hidden)?,
            Head::Untied(head) => head.forward(hidden)?,
        })
    }

    /// The mean cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`: the id that it must
    /// predict, or -100 for none. The logits are never held at once. Without a graph no gradient is prepared.
    ///
    /// # Errors
    ///
    /// A label out of range, or no label; candle's errors.
    pub fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, graph: Graph) -> Result<Tensor> {
        let options = CrossEntropyOptions {
            chunk: self.logits_chunk,
            ..CrossEntropyOptions::default()
        };
        Ok(match (&self.head, graph) {
            (Head::Tied(head), Graph::Keep) => head.cross_entropy(hidden, labels, options)?,
            (Head::Tied(head), Graph::Drop) => head.evaluate_cross_entropy(hidden, labels, options)?,
            (Head::Untied(head), Graph::Keep) => head.cross_entropy(hidden, labels, options)?,
            (Head::Untied(head), Graph::Drop) => head.evaluate_cross_entropy(hidden, labels, options)?,
        })
    }
}

impl Layer {
    fn load(weights: &Weights<'_>, config: &ModelConfig, index: usize) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let norm = |name: &str| weights.tensor(&format!("{prefix}.{name}.weight"), &[config.hidden_size]);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(weights, config, &format!("{prefix}.self_attn"))?,
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(weights, config, &format!("{prefix}.mlp"))?,
        })
    }

    fn forward(&self, hidden: &Tensor, rotation: &Rotation, eps: f64) -> Result<Tensor> {
        let attended = self
            .attention
            .forward(&rms_norm(hidden, &self.input_norm, eps)?, rotation)?;
        let hidden = (hidden + attended)?;
        let transformed = self
            .mlp
            .forward(&rms_norm(&hidden, &self.post_attention_norm, eps)?)?;
        Ok((hidden + transformed)?)
    }
}

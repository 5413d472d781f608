//! Decoders of the Llama family, differentiable everywhere, frozen but for the trainable tokens.

mod attention;
mod encoder;
mod head;
mod linear;
mod mlp;
mod rotary;
mod weights;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::{FrozenLinear, TrainableTokens};
use trainable_tokens_core::{
    CrossEntropyOptions, EmbeddingSource, LayerOptions, LogitsChunk, Padding, PaddingRule, TokenId,
    TokenRows, TokenSet,
};
use trainable_tokens_format::{Adapter, AdapterModule, BaseCheck, Checkpoint, LoraLayer};

use self::attention::Attention;
pub(crate) use self::encoder::Names;
pub use self::encoder::{Encoder, Pooling, PoolingMode};
use self::head::Head;
use self::linear::Linear;
pub use self::linear::LowRank;
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

/// A causal language model of which only the rows of some tokens train, and weights of LoRA where an adapter has some.
///
/// Every linear layer is a [`FrozenLinear`] and every norm's weight is captured: a backward pass makes gradients
/// of activations and of what trains, never of a frozen weight.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: TrainableTokens,
    layers: Vec<Arc<Layer>>,
    norm: Tensor,
    head: Head,
    rotary: Rotary,
    low_rank: Vec<LowRank>,
    num_parameters: usize,
    recomputes: bool,
    logits_chunk: LogitsChunk,
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
        let embedding = embedding(table, &tokens, &rows, padding, config.pad_token_id)?;
        let head = |weights: &Weights<'_>| {
            let head = weights.linear(HEAD_MODULE, config.vocab_size, config.hidden_size, false)?;
            Ok(Head::Untied(head))
        };
        Self::build(config.clone(), &weights, embedding, head)
    }

    /// Loads a checkpoint with an adapter: its rows for the input embedding, its rows for an untied head, and its weights of
    /// LoRA for linear layers, all trainable. Where the adapter's vocabulary is larger than the checkpoint's, the table grows
    /// by the adapter's rows, and so does the head.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load); [`Error::Format`] if the adapter does not fit, naming the rows that are missing;
    /// [`Error::Setting`] for rows or weights of LoRA of another module, which only merging applies.
    pub fn load_adapter(
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut config = ModelConfig::read(&checkpoint.config_path())?;
        adapter.check_against(checkpoint, BaseCheck::SameTable)?;
        let low_rank = low_rank(checkpoint, adapter, device)?;
        let weights = Weights::new(checkpoint, dtype, device).with_low_rank(low_rank);
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
        let embedding = embedding(
            weights.table(&table)?,
            &tokens,
            &rows,
            padding,
            config.pad_token_id,
        )?;
        let rows_of_head = head_rows(adapter, &config)?;
        let head = |weights: &Weights<'_>| {
            weights.expect_shape(&format!("{HEAD_MODULE}.weight"), &shape)?;
            let table = weights.table(&adapter.table(HEAD_MODULE, checkpoint)?)?;
            match rows_of_head {
                None => Ok(Head::Untied(
                    weights.with_low_rank_of(HEAD_MODULE, FrozenLinear::new(table, None)?),
                )),
                Some(module) => {
                    let tokens = module.token_set(table.dims()[0])?;
                    Ok(Head::Rows(trainable(table, &tokens, module.rows())?))
                }
            }
        };
        Self::build(config, &weights, embedding, head)
    }

    fn build<'a>(
        config: ModelConfig,
        weights: &Weights<'a>,
        embedding: TrainableTokens,
        untied_head: impl FnOnce(&Weights<'a>) -> Result<Head>,
    ) -> Result<Self> {
        let head = if config.tie_word_embeddings {
            Head::Tied(embedding.tied_head())
        } else {
            untied_head(weights)?
        };
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(weights, &config, index).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let norm = weights.tensor("model.norm.weight", &[config.hidden_size])?;
        weights.expect_all_taken()?;
        let rotary = Rotary::new(&config);
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            rotary,
            low_rank: weights.low_rank(),
            num_parameters: weights.num_parameters(),
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

    /// The untied head, if rows of its own train.
    pub fn head_rows(&self) -> Option<&TrainableTokens> {
        self.head.rows()
    }

    /// The weights of LoRA, in the order of the layers.
    pub fn low_rank(&self) -> &[LowRank] {
        &self.low_rank
    }

    /// Parameters of the checkpoint, frozen or not; a tied table counts once.
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
                let leaves: Vec<Tensor> = layer.leaves().filter(|_| hidden.track_op()).cloned().collect();
                let (layer, rotation, eps) = (layer.clone(), rotation.clone(), self.config.rms_norm_eps);
                let block =
                    move |x: &Tensor| layer.forward(x, &rotation, eps).map_err(candle_core::Error::wrap);
                recompute(&hidden, &leaves, Arc::new(block))?
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
        self.head.logits(hidden)
    }

    /// The mean cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`: the id that it must
    /// predict, or -100 for none. The logits are never held at once, but for a head with weights of LoRA. Without a graph no
    /// gradient is prepared.
    ///
    /// # Errors
    ///
    /// A label out of range, or no label; candle's errors.
    pub fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, graph: Graph) -> Result<Tensor> {
        let options = CrossEntropyOptions {
            chunk: self.logits_chunk,
            ..CrossEntropyOptions::default()
        };
        self.head.cross_entropy(hidden, labels, options, graph)
    }
}

/// The embedding layer over a table, its rows in the type that they train in.
fn embedding(
    table: Tensor,
    tokens: &TokenSet,
    rows: &TokenRows,
    padding: PaddingRule,
    pad_token_id: Option<u32>,
) -> Result<TrainableTokens> {
    let padding = pad_token_id.map(|id| Padding {
        token: TokenId(id),
        rule: padding,
    });
    Ok(trainable(table, tokens, rows)?.with_options(LayerOptions {
        padding,
        ..LayerOptions::default()
    }))
}

fn trainable(table: Tensor, tokens: &TokenSet, rows: &TokenRows) -> Result<TrainableTokens> {
    let rows = rows.to_dtype(rows.dtype().default_row_dtype());
    Ok(TrainableTokens::with_rows(table, &tokens.to_vec(), &rows)?)
}

/// The adapter's rows of an untied head. Rows of other modules than this and the input embedding have no place.
fn head_rows<'a>(adapter: &'a Adapter, config: &ModelConfig) -> Result<Option<&'a AdapterModule>> {
    let is_head = |module: &AdapterModule| module.path() == HEAD_MODULE && !config.tie_word_embeddings;
    let is_placed = |module: &&AdapterModule| {
        let tied_head = module.path() == HEAD_MODULE && config.tie_word_embeddings;
        module.path() == EMBEDDING_MODULE || tied_head || is_head(module)
    };
    match adapter.modules().iter().find(|module| !is_placed(module)) {
        None => Ok(adapter.modules().iter().find(|module| is_head(module))),
        Some(module) => Err(Error::Setting(format!(
            "the adapter has rows for {}, which is neither {EMBEDDING_MODULE} nor an untied {HEAD_MODULE}; `merge` applies \
             them",
            module.path()
        ))),
    }
}

/// The adapter's weights of LoRA, on the device.
fn low_rank(checkpoint: &Checkpoint, adapter: &Adapter, device: &Device) -> Result<Vec<LowRank>> {
    let deltas = adapter.lora_deltas(checkpoint)?;
    let low_rank = deltas.iter().map(|delta| {
        let weights = delta.weights();
        if weights.layer() == LoraLayer::Embedding || weights.replaces_base() {
            return Err(Error::Setting(format!(
                "module {} has weights of LoRA for an embedding or beside a weight of its own; `merge` applies them",
                weights.path()
            )));
        }
        LowRank::new(weights, device)
    });
    low_rank.collect()
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

    /// What trains in it.
    fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        let linear = self.attention.linear().into_iter().chain(self.mlp.linear());
        linear.flat_map(Linear::leaves)
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

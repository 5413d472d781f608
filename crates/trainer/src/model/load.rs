//! Loads models.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use trainable_tokens_candle::{FrozenLinear, TrainableTokens};
use trainable_tokens_core::{
    EmbedScale, EmbeddingSource, LayerOptions, LogitsChunk, Padding, PaddingRule, Softcap, TokenId,
    TokenRows, TokenSet,
};
use trainable_tokens_format::{Adapter, AdapterModule, BaseCheck, Checkpoint, LoraLayer};

use super::Decoder;
use super::head::Head;
use super::layer::Layer;
use super::linear::LowRank;
use super::norm;
use super::rotary::Rotary;
use super::weights::Weights;
use crate::config::WeightLayout;
use crate::{Error, ModelConfig, Result};

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
        Self::load_as(&config, checkpoint, tokens, rows, padding, dtype, device)
    }

    /// [`load`](Self::load) with a configuration that was read before.
    pub(crate) fn load_as(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        tokens: &[u32],
        rows: Option<&TokenRows>,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let weights = Weights::new(checkpoint, dtype, device);
        let (name, shape) = (config.embedding_tensor(), [config.vocab_size, config.hidden_size]);
        let (table, tokens, rows) = table_and_rows(&weights, checkpoint, (&name, shape), tokens, rows)?;
        let embedding = embedding(table, &tokens, &rows, options(config, padding))?;
        let head = |weights: &Weights<'_>| {
            weights.expect_untied_head(config.head_module())?;
            let out_in = [config.vocab_size, config.hidden_size];
            let head = weights.linear(config.head_module(), out_in, false, WeightLayout::OutIn)?;
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
        let config = ModelConfig::read(&checkpoint.config_path())?;
        Self::load_adapter_as(config, checkpoint, adapter, padding, dtype, device)
    }

    /// [`load_adapter`](Self::load_adapter) with a configuration that was read before.
    pub(crate) fn load_adapter_as(
        mut config: ModelConfig,
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        adapter.check_against(checkpoint, BaseCheck::SameTable)?;
        let low_rank = low_rank(checkpoint, adapter, device)?;
        let weights = Weights::new(checkpoint, dtype, device).with_low_rank(low_rank);
        let shape = [config.vocab_size, config.hidden_size];
        weights.expect_shape(&config.embedding_tensor(), &shape)?;
        // An adapter for transformers' `AutoModel` names modules otherwise.
        let named = checkpoint.named_for(adapter)?;
        let module = named.module_name(config.embedding_module());
        let table = adapter.table(&module, checkpoint)?;
        config.vocab_size = table.vocab_size();
        let (tokens, rows) = adapter_rows(adapter, &module, &table)?;
        let embedding = embedding(weights.table(&table)?, &tokens, &rows, options(&config, padding))?;
        let rows_of_head = head_rows(adapter, &module, &config)?;
        let path = config.head_module();
        let head = |weights: &Weights<'_>| {
            weights.expect_untied_head(path)?;
            weights.expect_shape(&format!("{path}.weight"), &shape)?;
            let table = weights.table(&adapter.table(path, checkpoint)?)?;
            match rows_of_head {
                None => Ok(Head::Untied(
                    weights.with_low_rank_of(path, FrozenLinear::new(table, None)?),
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
        let hidden = config.hidden_size;
        let positions = config.names.positions.map(|module| {
            let shape = [config.max_position_embeddings, hidden];
            weights.tensor(&format!("{module}.weight"), &shape)
        });
        let positions = positions.transpose()?;
        let norm = norm::load(weights, &config, config.names.norm, hidden)?;
        weights.expect_all_taken()?;
        let device = embedding.table().tensor().device().clone();
        Ok(Self {
            rotary: Rotary::new(&config),
            logits_softcap: config.final_logit_softcapping.map(Softcap::new).transpose()?,
            config,
            embedding,
            positions,
            layers,
            norm,
            head,
            device,
            low_rank: weights.low_rank(),
            num_parameters: weights.num_parameters(),
            recomputes: false,
            logits_chunk: LogitsChunk::default(),
        })
    }
}

fn options(config: &ModelConfig, rule: PaddingRule) -> LayerOptions {
    LayerOptions {
        padding: padding(config.pad_token_id, rule),
        scale: config.embed_scale.map(EmbedScale::TableDType),
        ..LayerOptions::default()
    }
}

/// The rule for a model's padding token, if it has one.
pub(super) fn padding(token: Option<u32>, rule: PaddingRule) -> Option<Padding> {
    let token = token.map(TokenId);
    token.map(|token| Padding { token, rule })
}

/// The table of a name and a shape, the tokens that train, and their rows: those given, or else the table's own.
pub(super) fn table_and_rows(
    weights: &Weights<'_>,
    checkpoint: &Checkpoint,
    (name, shape): (&str, [usize; 2]),
    tokens: &[u32],
    rows: Option<&TokenRows>,
) -> Result<(Tensor, TokenSet, TokenRows)> {
    // The table first: it shows that the vocabulary, whose size a set of tokens takes in memory, is there.
    let table = weights.tensor(name, &shape)?;
    let tokens = TokenSet::new(tokens.iter().copied(), shape[0])?;
    let rows = match rows {
        Some(rows) => rows.clone(),
        None => checkpoint.table(name)?.read_rows(tokens.ids())?,
    };
    Ok((table, tokens, rows))
}

/// The tokens and the rows that an adapter has for the module of a table: none if it has none for it.
pub(super) fn adapter_rows<S: EmbeddingSource>(
    adapter: &Adapter,
    module: &str,
    table: &S,
) -> Result<(TokenSet, TokenRows)> {
    let vocab_size = table.vocab_size();
    Ok(match adapter.module(module) {
        Some(module) => (module.token_set(vocab_size)?, module.rows().clone()),
        None => (
            TokenSet::new([], vocab_size)?,
            TokenRows::zeros(table.dtype(), 0, table.embedding_dim()),
        ),
    })
}

/// The embedding layer over a table, its rows in the type that they train in.
pub(super) fn embedding(
    table: Tensor,
    tokens: &TokenSet,
    rows: &TokenRows,
    options: LayerOptions,
) -> Result<TrainableTokens> {
    Ok(trainable(table, tokens, rows)?.with_options(options))
}

fn trainable(table: Tensor, tokens: &TokenSet, rows: &TokenRows) -> Result<TrainableTokens> {
    let rows = rows.to_dtype(rows.dtype().default_row_dtype());
    Ok(TrainableTokens::with_rows(table, &tokens.to_vec(), &rows)?)
}

/// The adapter's rows of an untied head. Rows of other modules than this and the input embedding have no place.
fn head_rows<'a>(
    adapter: &'a Adapter,
    embedding: &str,
    config: &ModelConfig,
) -> Result<Option<&'a AdapterModule>> {
    let head = config.head_module();
    let is_head = |module: &AdapterModule| module.path() == head && !config.tie_word_embeddings;
    let is_placed = |module: &&AdapterModule| module.path() == embedding || module.path() == head;
    match adapter.modules().iter().find(|module| !is_placed(module)) {
        None => Ok(adapter.modules().iter().find(|module| is_head(module))),
        Some(module) => Err(Error::Setting(format!(
            "the adapter has rows for {}, which is neither {embedding} nor an untied {head}; `merge` applies \
             them",
            module.path()
        ))),
    }
}

/// The adapter's weights of LoRA, on the device, their layers named as the checkpoint's modules are.
pub(super) fn low_rank(checkpoint: &Checkpoint, adapter: &Adapter, device: &Device) -> Result<Vec<LowRank>> {
    let deltas = adapter.lora_deltas(checkpoint)?;
    let low_rank = deltas.iter().map(|delta| {
        let weights = delta.weights();
        if weights.layer() == LoraLayer::Embedding || weights.replaces_base() {
            return Err(Error::Setting(format!(
                "module {} has weights of LoRA for an embedding or beside a weight of its own; `merge` applies them",
                weights.path()
            )));
        }
        LowRank::new(weights, &checkpoint.module_name(weights.path()), device)
    });
    low_rank.collect()
}

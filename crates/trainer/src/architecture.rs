//! Models of any family that this crate implements.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::{LogitsChunk, PaddingRule, TokenRows};
use trainable_tokens_format::{Adapter, Checkpoint};

use crate::config::WeightLayout;
use crate::json::parse_object;
use crate::model::Names;
use crate::{Decoder, Encoder, EncoderConfig, Graph, LowRank, ModelConfig, Result, file};

/// The configuration of a model of any family that this crate implements.
#[derive(Clone, Debug, PartialEq)]
pub enum Architecture {
    /// A causal language model.
    Decoder(Box<ModelConfig>),
    /// An encoder of the BERT family.
    Encoder(EncoderConfig),
}

/// What a data set must know of the model that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Longest sequence.
    pub max_length: usize,
    /// What shorter sequences are padded with; 0 without one.
    pub pad_token_id: Option<u32>,
}

/// The layers of a model that weights of LoRA can train beside.
pub(crate) struct LinearLayers {
    /// The ends of their paths, but for the head: what PEFT's `all-linear` stands for.
    pub(crate) names: Vec<&'static str>,
    /// Those of them that PEFT takes if none is named.
    pub(crate) preferred: Vec<&'static str>,
    /// The path of the output layer, if there is one.
    pub(crate) head: Option<String>,
    /// Whether that shares the embedding table.
    pub(crate) ties_head: bool,
    /// How the weights lie, but for the head's.
    pub(crate) layout: WeightLayout,
}

#[derive(Deserialize)]
struct Family {
    model_type: Option<String>,
}

impl Architecture {
    /// Reads `config.json`.
    ///
    /// # Errors
    ///
    /// As for [`ModelConfig::read`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = file::read(path)?;
        // What is no config at all is refused below, with the reason.
        let family = parse_object::<Family>(&text).ok().and_then(|it| it.model_type);
        if family.is_some_and(|family| EncoderConfig::is_family(&family)) {
            return EncoderConfig::parse(path, &text).map(Self::Encoder);
        }
        Ok(Self::Decoder(Box::new(ModelConfig::parse(path, &text)?)))
    }

    /// `model_type`.
    pub fn model_type(&self) -> &str {
        match self {
            Self::Decoder(config) => &config.model_type,
            Self::Encoder(config) => &config.model_type,
        }
    }

    /// What a data set must know of the model.
    pub fn input_spec(&self) -> InputSpec {
        match self {
            Self::Decoder(config) => config.as_ref().into(),
            Self::Encoder(config) => config.into(),
        }
    }

    /// Whether the head, if there is one, shares the embedding table.
    pub fn tie_word_embeddings(&self) -> bool {
        match self {
            Self::Decoder(config) => config.tie_word_embeddings,
            Self::Encoder(config) => config.tie_word_embeddings,
        }
    }

    /// The path of the embedding module in a checkpoint of this architecture, as PEFT's files spell it.
    pub fn embedding_module(&self, checkpoint: &Checkpoint) -> String {
        match self {
            Self::Decoder(config) => config.embedding_module().to_owned(),
            Self::Encoder(config) => Names::of(config, checkpoint).embedding(),
        }
    }

    /// The path of the output layer, tied or with a table of its own; `None` if a checkpoint of this architecture has none.
    pub fn head_module(&self, checkpoint: &Checkpoint) -> Option<String> {
        match self {
            Self::Decoder(config) => {
                let head = config.head_module();
                let is_there = config.tie_word_embeddings || checkpoint.contains(&format!("{head}.weight"));
                is_there.then(|| head.to_owned())
            }
            Self::Encoder(config) => {
                let head = Names::of(config, checkpoint).head();
                head.map(|head| head.decoder.to_owned())
            }
        }
    }

    /// The path of the output layer that shares the embedding table, if there is one.
    pub fn tied_head(&self, checkpoint: &Checkpoint) -> Option<String> {
        self.head_module(checkpoint)
            .filter(|_| self.tie_word_embeddings())
    }

    /// The layers of a checkpoint of this architecture that weights of LoRA can train beside.
    pub(crate) fn linear_layers(&self, checkpoint: &Checkpoint) -> LinearLayers {
        let (names, preferred, layout) = match self {
            Self::Decoder(config) => (
                config.linear_layers(),
                config.lora_targets(),
                config.names.layer.layout,
            ),
            Self::Encoder(config) => {
                let names = Names::of(config, checkpoint);
                (names.linear(), vec!["query", "value"], WeightLayout::OutIn)
            }
        };
        LinearLayers {
            names,
            preferred,
            head: self.head_module(checkpoint),
            ties_head: self.tie_word_embeddings(),
            layout,
        }
    }
}

impl From<&ModelConfig> for InputSpec {
    fn from(config: &ModelConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            max_length: config.max_length(),
            pad_token_id: config.pad_token_id,
        }
    }
}

impl From<&EncoderConfig> for InputSpec {
    fn from(config: &EncoderConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            max_length: config.max_length(),
            pad_token_id: config.pad_token_id,
        }
    }
}

impl From<&Architecture> for InputSpec {
    fn from(architecture: &Architecture) -> Self {
        architecture.input_spec()
    }
}

/// A model of any family that this crate implements, of which the rows of some tokens train.
#[derive(Debug)]
pub enum LanguageModel {
    /// A causal language model.
    Decoder(Decoder),
    /// An encoder of the BERT family.
    Encoder(Encoder),
}

impl From<Decoder> for LanguageModel {
    fn from(decoder: Decoder) -> Self {
        Self::Decoder(decoder)
    }
}

impl From<Encoder> for LanguageModel {
    fn from(encoder: Encoder) -> Self {
        Self::Encoder(encoder)
    }
}

/// The same expression for either kind of model.
macro_rules! either {
    ($model:expr, $it:ident => $value:expr) => {
        match $model {
            LanguageModel::Decoder($it) => $value,
            LanguageModel::Encoder($it) => $value,
        }
    };
}

impl LanguageModel {
    /// Loads a checkpoint as what its `config.json` says; see [`Decoder::load`].
    ///
    /// # Errors
    ///
    /// Those of [`Decoder::load`] and [`Encoder::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        tokens: &[u32],
        rows: Option<&TokenRows>,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(match Architecture::read(&checkpoint.config_path())? {
            Architecture::Decoder(config) => {
                Decoder::load_as(&config, checkpoint, tokens, rows, padding, dtype, device)?.into()
            }
            Architecture::Encoder(config) => {
                Encoder::load_as(config, checkpoint, tokens, rows, padding, dtype, device)?.into()
            }
        })
    }

    /// Loads a checkpoint with an adapter; see [`Decoder::load_adapter`].
    ///
    /// # Errors
    ///
    /// Those of [`Decoder::load_adapter`] and [`Encoder::load_adapter`].
    pub fn load_adapter(
        checkpoint: &Checkpoint,
        adapter: &Adapter,
        padding: PaddingRule,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(match Architecture::read(&checkpoint.config_path())? {
            Architecture::Decoder(config) => {
                Decoder::load_adapter_as(*config, checkpoint, adapter, padding, dtype, device)?.into()
            }
            Architecture::Encoder(config) => {
                Encoder::load_adapter_as(config, checkpoint, adapter, padding, dtype, device)?.into()
            }
        })
    }

    /// The model, if it is a decoder.
    pub fn as_decoder(&self) -> Option<&Decoder> {
        match self {
            Self::Decoder(decoder) => Some(decoder),
            Self::Encoder(_) => None,
        }
    }

    /// The model, if it is an encoder.
    pub fn as_encoder(&self) -> Option<&Encoder> {
        match self {
            Self::Decoder(_) => None,
            Self::Encoder(encoder) => Some(encoder),
        }
    }

    /// See [`Decoder::with_recomputation`].
    #[must_use]
    pub fn with_recomputation(self, recomputes: bool) -> Self {
        either!(self, model => model.with_recomputation(recomputes).into())
    }

    /// See [`Decoder::with_logits_chunk`].
    #[must_use]
    pub fn with_logits_chunk(self, chunk: LogitsChunk) -> Self {
        either!(self, model => model.with_logits_chunk(chunk).into())
    }

    /// What a data set must know of the model.
    pub fn input_spec(&self) -> InputSpec {
        either!(self, model => model.config().into())
    }

    /// The path of the embedding module, as PEFT's files and `target_modules` spell it.
    pub fn embedding_module(&self) -> String {
        match self {
            Self::Decoder(decoder) => decoder.config().embedding_module().to_owned(),
            Self::Encoder(encoder) => encoder.embedding_module(),
        }
    }

    /// The embedding, whose rows train.
    pub fn embedding(&self) -> &TrainableTokens {
        either!(self, model => model.embedding())
    }

    /// The embedding, to step its rows.
    pub fn embedding_mut(&mut self) -> &mut TrainableTokens {
        either!(self, model => model.embedding_mut())
    }

    /// The untied head, if rows of its own train.
    pub fn head_rows(&self) -> Option<&TrainableTokens> {
        self.as_decoder().and_then(Decoder::head_rows)
    }

    /// The weights of LoRA, in the order of the layers.
    pub fn low_rank(&self) -> &[LowRank] {
        either!(self, model => model.low_rank())
    }

    /// Parameters of the checkpoint, frozen or not; a tied table counts once.
    pub fn num_parameters(&self) -> usize {
        either!(self, model => model.num_parameters())
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        either!(self, model => model.device())
    }

    /// What the embedding module returns for `input_ids` `[B, L]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// A token out of range; candle's errors.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        either!(self, model => model.embed(input_ids))
    }

    /// The last hidden states `[B, L, D]` of `embeddings` `[B, L, D]` of the tokens `input_ids` `[B, L]`, of each row its
    /// first `lengths` tokens, or all without lengths. What follows them is padding: a decoder's tokens do not see it, for
    /// they see nothing behind themselves, and an encoder's are kept from it.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`](crate::Error::Setting) for a sequence longer than the model's positions; candle's errors.
    pub fn hidden(
        &self,
        embeddings: &Tensor,
        input_ids: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        match self {
            Self::Decoder(decoder) => decoder.hidden(embeddings),
            Self::Encoder(encoder) => encoder.hidden(embeddings, input_ids, lengths),
        }
    }

    /// The logits of hidden states `[.., D]`: `[.., V]`.
    ///
    /// # Errors
    ///
    /// Those of [`Decoder::logits`] and [`Encoder::logits`].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        either!(self, model => model.logits(hidden))
    }

    /// The mean cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`.
    ///
    /// # Errors
    ///
    /// Those of [`Decoder::cross_entropy`] and [`Encoder::cross_entropy`].
    pub fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, graph: Graph) -> Result<Tensor> {
        either!(self, model => model.cross_entropy(hidden, labels, graph))
    }
}

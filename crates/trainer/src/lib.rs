//! Trains chosen token rows of Hugging Face checkpoints with differentiable models on candle.
//!
//! - [`Decoder`]: a causal language model configured by its `config.json` ([`ModelConfig`]: Llama, Mistral, Qwen 2 and 3,
//!   Gemma, Gemma 2 and 3, GPT-2), every weight frozen but the rows of some tokens; no backward pass makes a gradient of a
//!   frozen weight.
//! - [`Encoder`]: the same for the BERT family ([`EncoderConfig`]), sentence encoders too ([`Pooling`]).
//!   [`LanguageModel`] is either, as `config.json` says.
//! - [`Objective`]: the next token, masked tokens ([`Masking`]), or a word taught to a sentence encoder ([`Teach`],
//!   [`Retrieval`]).
//! - [`LoraOptions`], [`LowRank`]: weights of LoRA that train beside the rows.
//! - [`Dataset`], [`Batch`], [`Sampler`]: JSON Lines or text, through the model's tokenizer ([`Vocabulary`]).
//! - [`Trainer`]: steps, schedules ([`Schedule`]), gradient accumulation, clipping, evaluation, early
//!   stopping, exact resumption. Before the first step,
//!   [`check_gradient`] compares the gradient with finite differences of the loss and refuses to train on a wrong
//!   one.
//! - [`generate`]: continues a prompt, greedily or by draws ([`GenerateOptions`]), with a [`KeyValueCache`].
//! - [`evaluate`], [`token_loss`]: what training is measured by.

mod accumulate;
mod activity;
mod architecture;
mod config;
mod data;
mod digest;
mod early_stopping;
mod error;
mod evaluate;
mod file;
mod generate;
mod json;
mod lora;
mod loss;
mod memory;
mod model;
mod objective;
mod ops;
mod options;
mod part;
mod probe;
mod schedule;
mod trainer;
mod vocabulary;

pub use activity::TokenActivity;
pub use architecture::{Architecture, InputSpec, LanguageModel};
pub use config::{Activation, EncoderConfig, LayerType, ModelConfig, NormKind, Positions, Rope, RopeScaling};
pub use data::{Batch, Dataset, Example, IGNORED, Sampler};
pub use early_stopping::{BestEvaluation, EarlyStopping};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate};
pub use generate::{GenerateOptions, Generated, generate};
pub use lora::{ALL_LINEAR, LoraOptions};
pub use loss::Graph;
pub use memory::peak_rss_bytes;
pub use model::{Decoder, Encoder, KeyValueCache, LowRank, Pooling, PoolingMode};
pub use objective::{MaskTrainable, Masking, Objective, Retrieval, Teach, TeachLoss, token_loss};
pub use options::{DecayToward, NormTarget, OptimizerKind, TrainOptions};
pub use probe::{GradientCheck, check_gradient};
pub use schedule::Schedule;
pub use trainer::{StepMetrics, Trainer};
pub use vocabulary::{AddedTokens, Context, MissedContext, Pieces, TokenFlags, TokenKind, Vocabulary};

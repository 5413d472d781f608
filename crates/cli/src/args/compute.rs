//! What a model is asked for, and where it computes.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use trainable_tokens_trainer::GenerateOptions;

use super::positive;
use crate::objective::ObjectiveArgs;

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directory.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// Data, as for train; may be given several times.
    #[arg(long, required = true, value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) objective: ObjectiveArgs,
    /// Seed of the masks.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Lines at a time.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    pub(crate) batch_size: usize,
    /// Cut longer lines, and plain text, at this many tokens. Special tokens at the end of a line of text stay.
    #[arg(long, value_parser = positive)]
    pub(crate) max_length: Option<usize>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directory.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// JSON file: a list of equally long lists of token ids.
    #[arg(long, value_name = "FILE")]
    pub(crate) input_ids: PathBuf,
    /// Safetensors file to write: embeddings [B, L, D] and logits [B, L, V], both F32; of a model without a head, hidden
    /// [B, L, D]; of one that embeds sentences, `sentence_embeddings` [B, D] too.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directory.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// The most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = GenerateOptions::default().max_new_tokens)]
    pub(crate) max_new_tokens: usize,
    /// What logits are divided by before a token is drawn; at 0 the likeliest token is taken.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw from the likeliest tokens whose probabilities sum up to P.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// What is continued.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// Text to continue, through the model's tokenizer.
    #[arg(long = "prompt", value_name = "TEXT")]
    pub(crate) text: Option<String>,
    /// The ids of its tokens instead, separated by commas.
    #[arg(long = "prompt-ids", value_delimiter = ',', value_name = "IDS")]
    pub(crate) ids: Vec<u32>,
}

/// Where and in what type the frozen weights work.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ComputeArgs {
    /// Where to compute: cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: DeviceArg,
    /// Element type that the frozen weights are converted to; rows train in f32.
    #[arg(long, value_enum, default_value_t = WeightType::F32)]
    pub(crate) dtype: WeightType,
}

/// A device by name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceArg {
    Cpu,
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            None if text == "metal" => Ok(Self::Metal),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                number.parse().map(Self::Cuda).map_err(|_| String::new())
            }
            _ => Err("expected cpu, cuda, cuda:N or metal".to_owned()),
        }
    }
}

/// Element types of weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum WeightType {
    F32,
    Bf16,
}

//! What is done with the files of models and adapters.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::positive;

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directories, with rows of tokens, weights of LoRA or both; merged in this order.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    pub(crate) adapter: Vec<PathBuf>,
    /// Model directory to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Refuse to write a value that is not finite where the model has one that is.
    #[arg(long)]
    pub(crate) safe: bool,
    /// What counts for a token that several adapters train.
    #[arg(long, value_enum, default_value_t = OverlapChoice::Error)]
    pub(crate) overlap: OverlapChoice,
    /// With --overlap mean: the weight of each adapter, in their order [default: equal].
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS")]
    pub(crate) weights: Vec<f64>,
}

/// What counts for a token that several adapters train.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverlapChoice {
    /// Nothing: it is an error.
    Error,
    /// The row of the last of them.
    Last,
    /// The mean of their rows.
    Mean,
}

#[derive(Debug, Args)]
pub(crate) struct ExtractArgs {
    /// Model directory that the tuned model started from.
    #[arg(long, value_name = "DIR")]
    pub(crate) base: PathBuf,
    /// Model directory that differs from it in rows of the embedding, the head, or both; it may have more rows.
    #[arg(long, value_name = "DIR")]
    pub(crate) tuned: PathBuf,
    /// Adapter directory to write; merged into the base, the adapter gives the tuned model.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Refuse if more rows differ [default: half of the table's].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) max_rows: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct SplitArgs {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Directory of a LoRA adapter that trains tokens.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: PathBuf,
    /// Model directory to write, with the rows of the tokens.
    #[arg(long, value_name = "DIR")]
    pub(crate) out_model: PathBuf,
    /// Adapter directory to write, with the weights of LoRA alone.
    #[arg(long, value_name = "DIR")]
    pub(crate) out_adapter: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// An adapter directory, or a model directory.
    pub(crate) a: PathBuf,
    /// Another one of the same kind.
    pub(crate) b: PathBuf,
    /// Rows to list of each table; all are counted.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// An adapter directory, a model directory or a safetensors file.
    pub(crate) path: PathBuf,
    /// For an adapter: the model to measure the drift of its rows from.
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directory, or one that holds several, each in a directory of its name.
    #[arg(long)]
    pub(crate) adapter: PathBuf,
}

//! The commands and their options.

mod compute;
mod files;
mod shell;
mod tokens;
mod train;
mod watch;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use compute::{ComputeArgs, DeviceArg, EvalArgs, ForwardArgs, GenerateArgs, WeightType};
pub(crate) use files::{DiffArgs, ExtractArgs, InspectArgs, MergeArgs, OverlapChoice, SplitArgs, VerifyArgs};
pub(crate) use shell::{CompletionsArgs, ManArgs};
pub(crate) use tokens::{AddTokensArgs, InitArgs, RowInitArgs, TokenArgs};
pub(crate) use train::{DecayToward, NormChoice, Optimizer, PaddingChoice, Schedule, TrainArgs};
pub(crate) use watch::{PlotArgs, WatchArgs};

/// Fine-tune a few token rows of a frozen embedding table, in the file format of PEFT's Trainable Tokens.
#[derive(Debug, Parser)]
#[command(
    name = "trainable-tokens",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Replace output that exists.
    #[arg(long, global = true)]
    pub(crate) force: bool,
    /// Add the chain of causes to error messages.
    #[arg(long, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train two tokens of the small model inside this program, and show what changed.
    Demo(DemoArgs),
    /// Train token rows of a model and write a PEFT adapter.
    ///
    /// Ctrl-C (or SIGTERM) ends a run after the step that it is at: the adapter is saved with the state to resume from, the
    /// metrics end with their summary, and the exit status is 130. A second one ends it at once; then there is what --save-every
    /// has saved.
    Train(Box<TrainArgs>),
    /// Measure the loss of a model, with or without an adapter.
    Eval(EvalArgs),
    /// Write the embeddings and logits of token ids, for comparing implementations.
    Forward(ForwardArgs),
    /// Continue a prompt with a model, with or without an adapter.
    Generate(GenerateArgs),
    /// Write an adapter that changes nothing yet, or whose rows start anew.
    Init(InitArgs),
    /// Add tokens to a copy of a model: to its tokenizer, its tables and its config.
    AddTokens(AddTokensArgs),
    /// Bake adapters into a copy of a model.
    Merge(MergeArgs),
    /// Write the adapter of the rows in which a tuned model differs from its base.
    Extract(ExtractArgs),
    /// Compare two adapters token by token, or two models row by row.
    Diff(DiffArgs),
    /// Bake the rows of a LoRA adapter into a copy of the model, and write the adapter without them.
    Split(SplitArgs),
    /// Show what an adapter, a safetensors file or a model directory holds.
    Inspect(InspectArgs),
    /// Check that an adapter fits a model.
    Verify(VerifyArgs),
    /// Draw the curves of a run from its metrics file.
    Plot(PlotArgs),
    /// Write a script of completions for a shell.
    Completions(CompletionsArgs),
    /// Write the manual page.
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Directory for the model, the adapter, the merged model, metrics and plot.
    #[arg(long, default_value = "trainable-tokens-demo", value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// Parses a size that must not be 0.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) | Err(_) => Err("expected a whole number above 0".to_owned()),
        Ok(number) => Ok(number),
    }
}

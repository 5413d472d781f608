//! The commands and their options.

mod shell;
mod watch;

use std::num::NonZero;
use std::path::PathBuf;

use clap::{ArgAction, ArgGroup, Args, Parser, Subcommand, ValueEnum};
pub(crate) use shell::{CompletionsArgs, ManArgs};
use trainable_tokens_trainer::{GenerateOptions, LoraOptions};
pub(crate) use watch::{PlotArgs, WatchArgs};

use crate::initial::{InitSpec, TokenInit};
use crate::objective::ObjectiveArgs;
use crate::tokens::{IdRanges, TokenLr};

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

/// Which tokens train.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which tokens").required(true).args(["tokens", "token_ids"])))]
pub(crate) struct TokenArgs {
    /// Tokens by their strings, separated by commas; each must be exactly one token of the model.
    #[arg(long, value_delimiter = ',', value_name = "STRINGS")]
    pub(crate) tokens: Vec<String>,
    /// Tokens by their ids, such as 12,7,300-310. The order is kept.
    #[arg(long, value_name = "IDS")]
    pub(crate) token_ids: Option<IdRanges>,
}

/// How the rows start.
#[derive(Debug, Args)]
pub(crate) struct RowInitArgs {
    /// How the rows start: keep, zeros, random[:STD], mean[:others], mean-covariance[:SCALE][:others], copy:TOKEN,
    /// mean-of:ID,ID,…, interpolate:TOKEN:TOKEN:T, subtokens or description:TEXT; each may be followed by +noise:STD,
    /// +norm-match[:NORM] and +seed:N.
    #[arg(long, default_value = "keep", value_name = "MODE")]
    pub(crate) init: InitSpec,
    /// How the row of one token starts, such as '<tok>=description:a small bird'; may be given for several tokens.
    #[arg(long, value_name = "TOKEN=MODE")]
    pub(crate) init_token: Vec<TokenInit>,
}

/// What trains beside the rows.
#[derive(Debug, Args)]
pub(crate) struct LoraArgs {
    /// Also train weights of LoRA, of this rank.
    #[arg(long, value_name = "R", value_parser = positive)]
    lora_rank: Option<usize>,
    /// Linear layers that get them, as PEFT names them, or all-linear [default: those of queries and values].
    #[arg(long, value_delimiter = ',', requires = "lora_rank", value_name = "MODULES")]
    lora_targets: Vec<String>,
    /// LoRA's alpha: the product of the weights is multiplied by alpha / rank.
    #[arg(long, default_value_t = 8.0, requires = "lora_rank")]
    lora_alpha: f64,
    /// Multiply by alpha / sqrt(rank) instead.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, hide_possible_values = true, requires = "lora_rank")]
    use_rslora: bool,
}

impl LoraArgs {
    /// The settings, if LoRA is asked for.
    pub(crate) fn options(&self, seed: u64) -> Option<LoraOptions> {
        Some(LoraOptions {
            rank: self.lora_rank?,
            alpha: self.lora_alpha,
            rank_stabilized: self.use_rslora,
            targets: self.lora_targets.clone(),
            seed,
        })
    }
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

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// TOML file with any of these options; those on the command line win. Its keys are their names, as in `batch-size = 4` or
    /// `batch_size = 4`. The options of a run are written beside its adapter, in `train_config.toml`.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// All options as such a file.
    #[arg(skip)]
    pub(crate) resolved: String,
    /// Model directory: config.json, model.safetensors or shards, tokenizer.json where text is used.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Training data: JSON Lines with `input_ids` (and labels) or text, or a .txt file; to teach, JSON Lines with a
    /// sentence and a definition.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    #[command(flatten)]
    pub(crate) objective: ObjectiveArgs,
    #[command(flatten)]
    pub(crate) tokens: TokenArgs,
    #[command(flatten)]
    pub(crate) init: RowInitArgs,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    /// Adapter directory to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Steps to take [default: one pass over the data].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: Option<u64>,
    /// Lines at a time.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    pub(crate) batch_size: usize,
    /// Batches per step, in whose gradient all targets count alike, as if they were one batch.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub(crate) accumulate: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub(crate) lr: f64,
    /// Update rule.
    #[arg(long, value_enum, default_value_t = Optimizer::Adamw)]
    pub(crate) optimizer: Optimizer,
    /// Adam's decay of the first moment.
    #[arg(long, default_value_t = 0.9)]
    pub(crate) beta1: f64,
    /// Adam's decay of the second moment.
    #[arg(long, default_value_t = 0.999)]
    pub(crate) beta2: f64,
    /// Adam's summand in the denominator.
    #[arg(long, default_value_t = 1e-8)]
    pub(crate) eps: f64,
    /// Strength of weight decay.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) weight_decay: f64,
    /// Momentum of sgd.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) momentum: f64,
    /// Where weight decay pulls the rows to.
    #[arg(long, value_enum, default_value_t = DecayToward::Zero)]
    pub(crate) decay_toward: DecayToward,
    /// Course of the learning rate.
    #[arg(long, value_enum, default_value_t = Schedule::Constant)]
    pub(crate) schedule: Schedule,
    /// Steps in which the learning rate rises from 0.
    #[arg(long, default_value_t = 0)]
    pub(crate) warmup_steps: u64,
    /// With the schedules linear and cosine: where the learning rate ends, relative to --lr.
    #[arg(long, value_name = "RATIO", default_value_t = 0.0)]
    pub(crate) min_lr_ratio: f64,
    /// Clip the gradient of all that trains together to this L2 norm.
    #[arg(long)]
    pub(crate) max_grad_norm: Option<f64>,
    /// Learning rates of single tokens, such as '<a>=1e-3,12=0'; the schedule applies to them too. The row of a token with 0 is
    /// frozen: nothing changes it, not even decay.
    #[arg(long, value_delimiter = ',', value_name = "TOKEN=LR")]
    pub(crate) token_lr: Vec<TokenLr>,
    /// After each step, scale the rows to the mean norm of the table's rows, or each to the norm it started with.
    #[arg(long, value_enum)]
    pub(crate) match_norm: Option<NormChoice>,
    /// After each step, scale down rows that are longer than this L2 norm.
    #[arg(long, value_name = "NORM")]
    pub(crate) max_row_norm: Option<f64>,
    /// Seed of the shuffle, of masks, and of rows and weights of LoRA that start with random numbers.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Take the lines in a new order at each pass.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub(crate) shuffle: bool,
    /// Cut longer lines, and plain text, at this many tokens. Special tokens at the end of a line of text stay.
    #[arg(long, value_parser = positive)]
    pub(crate) max_length: Option<usize>,
    /// Compute the activations of layers again in the backward pass instead of keeping them: less memory, more time.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub(crate) recompute: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Module whose rows train, as PEFT names it; only the input embedding can be, and is without this option.
    #[arg(long, value_delimiter = ',', value_name = "MODULES")]
    pub(crate) target_modules: Option<Vec<String>>,
    /// What the gradient of a chosen token does that is the model's padding token.
    #[arg(long, value_enum)]
    pub(crate) padding_idx: Option<PaddingChoice>,
    #[command(flatten)]
    pub(crate) watch: WatchArgs,
    /// Write the adapter, with the state to resume from, every N steps.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) save_every: Option<u64>,
    /// Continue from an adapter directory that --save-every wrote.
    #[arg(long, value_name = "DIR")]
    pub(crate) resume: Option<PathBuf>,
    /// Data to evaluate on, before and after training.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_data: Option<PathBuf>,
    /// Evaluate every N steps too.
    #[arg(long, value_name = "N", requires = "eval_data", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) eval_every: Option<u64>,
    /// End the run after this many evaluations in a row without an improvement.
    #[arg(long, value_name = "N", requires = "eval_every", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) early_stopping_patience: Option<u64>,
    /// An improvement is a held-out loss that is lower than the best by more than this.
    #[arg(
        long,
        value_name = "LOSS",
        default_value_t = 0.0,
        requires = "early_stopping_patience"
    )]
    pub(crate) early_stopping_min_delta: f64,
    /// In the end, keep the adapter of the evaluation with the lowest held-out loss, and not that of the last step. Until then
    /// it is in the directory `best` inside the adapter's. A run that has ended this way cannot be resumed.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, hide_possible_values = true, requires = "eval_data")]
    pub(crate) keep_best: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Adapter directory.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// Data, as for train.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
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

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Model directory.
    #[arg(long)]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) tokens: TokenArgs,
    #[command(flatten)]
    pub(crate) init: RowInitArgs,
    /// Seed of rows that start with random numbers.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Adapter directory to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // flags of the command line
pub(crate) struct AddTokensArgs {
    /// Model directory, with tokenizer.json.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Strings of the new tokens, separated by commas.
    #[arg(long, required = true, value_delimiter = ',', value_name = "STRINGS")]
    pub(crate) tokens: Vec<String>,
    /// Add them as normal tokens: found after the text was normalized, and not skipped with special tokens.
    #[arg(long)]
    pub(crate) normal: bool,
    /// Have each token take in the spaces before it, as words of most models do.
    #[arg(long)]
    pub(crate) lstrip: bool,
    /// Have each token take in the spaces after it.
    #[arg(long)]
    pub(crate) rstrip: bool,
    /// Find the tokens only where no letter or digit is next to them.
    #[arg(long)]
    pub(crate) single_word: bool,
    /// How the rows start, as in `init`; `keep` is for padded rows that are there already.
    #[arg(long, default_value = "mean-covariance", value_name = "MODE")]
    pub(crate) init: InitSpec,
    /// How the row of one token starts, such as '<tok>=description:a small bird'; may be given for several tokens.
    #[arg(long, value_name = "TOKEN=MODE")]
    pub(crate) init_token: Vec<TokenInit>,
    /// Seed of rows that start with random numbers.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Round the number of rows up to a multiple of N.
    #[arg(long, value_name = "N")]
    pub(crate) pad_to_multiple_of: Option<NonZero<usize>>,
    /// Model directory to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

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

/// Update rules.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Optimizer {
    Adamw,
    Adam,
    Sgd,
}

/// Where weight decay pulls to.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DecayToward {
    Zero,
    Original,
}

/// Courses of the learning rate.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Schedule {
    /// Always the same.
    Constant,
    /// Straight down to 0 at the last step.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// By the inverse root of the steps, from the warm-up's last or else with a time scale of 10000 steps.
    InverseSqrt,
}

/// Element types of weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum WeightType {
    F32,
    Bf16,
}

/// Which norm rows keep.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NormChoice {
    /// The mean norm of all rows of the table.
    Mean,
    /// The norm that the row started with.
    Original,
}

/// What becomes of the lookup's gradient at the padding token.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PaddingChoice {
    /// Torch's rule: no gradient from the lookup, only from a tied head.
    Torch,
    /// Like any other token.
    Train,
}

/// A device by name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceArg {
    Cpu,
    Cuda(usize),
    Metal,
}

impl std::str::FromStr for DeviceArg {
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

/// Parses a size that must not be 0.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) | Err(_) => Err("expected a whole number above 0".to_owned()),
        Ok(number) => Ok(number),
    }
}

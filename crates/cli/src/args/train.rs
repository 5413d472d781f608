//! How rows train, and what trains beside them.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use trainable_tokens_trainer::LoraOptions;

use super::{ComputeArgs, RowInitArgs, TokenArgs, WatchArgs, positive};
use crate::objective::ObjectiveArgs;
use crate::tokens::{CommaList, TokenLr};

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
    /// sentence and a definition. May be given several times: the files count as one, in their order.
    #[arg(long, required = true, value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
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
    /// Learning rates of single tokens, such as '<a>=1e-3,12=0', a comma inside a token written `\,`; the schedule applies to
    /// them too. The row of a token with 0 is frozen: nothing changes it, not even decay.
    #[arg(long, value_name = "TOKEN=LR")]
    pub(crate) token_lr: Vec<CommaList<TokenLr>>,
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
    /// Data to evaluate on, before and after training; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_data: Vec<PathBuf>,
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

//! Which tokens, and how their rows start.

use std::num::NonZero;
use std::path::PathBuf;

use clap::{ArgGroup, Args};

use crate::initial::{InitSpec, TokenInit};
use crate::tokens::{CommaList, IdRanges};

/// Which tokens train.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which tokens").required(true).args(["tokens", "token_ids"])))]
pub(crate) struct TokenArgs {
    /// Tokens by their strings, separated by commas; each must be exactly one token of the model. A comma inside a token is
    /// written `\,`, as in '<a>,\,,<b>'.
    #[arg(long, value_name = "STRINGS")]
    pub(crate) tokens: Vec<CommaList<String>>,
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
    /// Strings of the new tokens, separated by commas; a comma inside a token is written `\,`.
    #[arg(long, required = true, value_name = "STRINGS")]
    pub(crate) tokens: Vec<CommaList<String>>,
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

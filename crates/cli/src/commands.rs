//! One module per command.

mod demo;
mod eval;
mod forward;
mod init;
mod inspect;
mod merge;
mod train;
mod verify;

use anyhow::Result;
use trainable_tokens_format::Overwrite;

use crate::args::{Cli, Command};

/// Runs the command that was asked for.
pub(crate) fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Demo(args) => demo::run(args, cli),
        Command::Train(args) => train::run(args, cli),
        Command::Eval(args) => eval::run(args, cli),
        Command::Forward(args) => forward::run(args, cli),
        Command::Init(args) => init::run(args, cli),
        Command::Merge(args) => merge::run(args, cli),
        Command::Inspect(args) => inspect::run(args, cli),
        Command::Verify(args) => verify::run(args, cli),
    }
}

impl Cli {
    /// What `--force` says.
    fn overwrite(&self) -> Overwrite {
        if self.force {
            Overwrite::Replace
        } else {
            Overwrite::Refuse
        }
    }
}

/// Refuses early what would be refused at the end, after all the work.
fn check_free(path: &std::path::Path, overwrite: Overwrite) -> Result<()> {
    if overwrite == Overwrite::Refuse && path.exists() {
        anyhow::bail!("{} already exists; use --force to replace it", path.display());
    }
    Ok(())
}

//! One module per command.

mod demo;
mod diff;
mod eval;
mod extract;
mod forward;
mod generate;
mod init;
mod inspect;
mod merge;
mod split;
mod train;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use trainable_tokens_format::Overwrite;

use crate::args::{Cli, Command};

/// Runs the command that was asked for.
pub(crate) fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Demo(args) => demo::run(args, cli),
        Command::Train(args) => train::run(args, cli),
        Command::Eval(args) => eval::run(args, cli),
        Command::Forward(args) => forward::run(args, cli),
        Command::Generate(args) => generate::run(args, cli),
        Command::Init(args) => init::run(args, cli),
        Command::Merge(args) => merge::run(args, cli),
        Command::Extract(args) => extract::run(args, cli),
        Command::Diff(args) => diff::run(args, cli),
        Command::Split(args) => split::run(args, cli),
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
fn check_free(path: &Path, overwrite: Overwrite) -> Result<()> {
    if overwrite == Overwrite::Refuse && path.exists() {
        anyhow::bail!("{} already exists; use --force to replace it", path.display());
    }
    Ok(())
}

/// Refuses an output directory that is, or holds, something else that is read or written: a directory is replaced
/// as a whole, and all that it holds goes.
fn check_apart<'a>(out: &Path, others: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let resolved_out = resolved(out);
    match others
        .into_iter()
        .find(|other| resolved(other).starts_with(&resolved_out))
    {
        None => Ok(()),
        Some(other) => anyhow::bail!(
            "will not write to {}: {} would go with what it holds; choose another output directory",
            out.display(),
            other.display()
        ),
    }
}

/// The adapters in a directory, as PEFT lays them out: its own at the top, others in subdirectories of their names. They
/// have names only if there are several. A directory without any is taken for one, so that reading it says what is missing.
fn adapters_in(dir: &Path) -> Result<Vec<(Option<String>, PathBuf)>> {
    const CONFIG: &str = "adapter_config.json";
    let mut named = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry
            .with_context(|| format!("cannot list {}", dir.display()))?
            .path();
        if path.join(CONFIG).is_file() {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            named.push((Some(name), path));
        }
    }
    named.sort();
    if named.is_empty() {
        return Ok(vec![(None, dir.to_owned())]);
    }
    if dir.join(CONFIG).is_file() {
        named.insert(0, (Some("default".to_owned()), dir.to_owned()));
    }
    Ok(named)
}

/// The path without symbolic links, of something that need not exist.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let real = |ancestor: &Path| {
        let rest = path.strip_prefix(ancestor).ok()?;
        Some(ancestor.canonicalize().ok()?.join(rest).components().collect())
    };
    path.ancestors().find_map(real).unwrap_or_else(|| path.clone())
}

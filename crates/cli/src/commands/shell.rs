//! `completions` and `man`: what the shell and `man` know of the program, written on standard output.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory as _};
use serde::Serialize;
use trainable_tokens_format::write_file_atomically;

use super::check_free;
use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::output::print;

#[derive(Serialize)]
struct Pages {
    out: String,
    pages: Vec<String>,
}

#[derive(Serialize)]
struct Page {
    page: String,
}

#[derive(Serialize)]
struct Script {
    shell: String,
    script: String,
}

pub(super) fn completions(args: &CompletionsArgs, cli: &Cli) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "trainable-tokens", &mut script);
    let script = Script {
        shell: args.shell.to_string(),
        script: String::from_utf8(script)?,
    };
    print(cli.json, &script, |script| script.script.clone())
}

pub(super) fn man(args: &ManArgs, cli: &Cli) -> Result<()> {
    let mut root = Cli::command();
    root.build();
    match &args.out {
        None => {
            let page = Page {
                page: String::from_utf8(render(&root)?)?,
            };
            print(cli.json, &page, |page| page.page.clone())
        }
        Some(dir) => pages(&root, dir, cli),
    }
}

/// A page for the program, and one for each command.
fn pages(root: &Command, dir: &Path, cli: &Cli) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let commands = root
        .get_subcommands()
        .filter(|command| command.get_name() != "help");
    let mut written = Vec::new();
    for command in std::iter::once(root).chain(commands) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        let path = dir.join(format!("{name}.1"));
        check_free(&path, cli.overwrite())?;
        write_file_atomically(&path, cli.overwrite(), |file| -> Result<()> {
            file.write_all(&render(command)?)
                .with_context(|| format!("cannot write {}", path.display()))
        })?;
        written.push(format!("{name}.1"));
    }
    let output = Pages {
        out: dir.display().to_string(),
        pages: written,
    };
    print(cli.json, &output, |output| {
        format!("wrote {} pages into {}", output.pages.len(), output.out)
    })
}

fn render(command: &Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    Ok(page)
}

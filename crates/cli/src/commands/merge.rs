//! `merge`: adapters baked into a copy of a model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::TokenId;
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint, merge_checkpoint};

use super::check_free;
use crate::args::{Cli, MergeArgs};
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    rows: usize,
    rewritten: Vec<PathBuf>,
    shared: Vec<PathBuf>,
    copied: Vec<PathBuf>,
    left_out: Vec<PathBuf>,
}

pub(super) fn run(args: &MergeArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    let base = Checkpoint::open(&args.model)?;
    let mut replacements = Vec::new();
    let mut owner: HashMap<(String, TokenId), &Path> = HashMap::new();
    for dir in &args.adapter {
        let adapter = Adapter::read(dir)?;
        adapter.check_against(&base, BaseCheck::SameTable)?;
        for replacement in adapter.replacements(&base)? {
            for id in &replacement.ids {
                if let Some(other) = owner.insert((replacement.tensor.clone(), *id), dir) {
                    bail!(
                        "token id {id} is trained by both {} and {}; merge adapters of different tokens only",
                        other.display(),
                        dir.display()
                    );
                }
            }
            replacements.push(replacement);
        }
    }
    let report = merge_checkpoint(&base, &replacements, &args.out, cli.overwrite())?;
    let output = Output {
        out: &args.out,
        rows: report.rows,
        rewritten: report.rewritten,
        shared: report.shared,
        copied: report.copied,
        left_out: report.left_out,
    };
    print(cli.json, &output, |o| {
        let mut text = format!(
            "wrote {}: {} rows replaced in {}",
            o.out.display(),
            o.rows,
            names(&o.rewritten)
        );
        if !o.shared.is_empty() {
            text += &format!("; {} linked, unchanged", names(&o.shared));
        }
        if !o.left_out.is_empty() {
            text += &format!("; left out, for they hold the old rows: {}", names(&o.left_out));
        }
        text
    })
}

fn names(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

//! `merge`: adapters baked into a copy of a model.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::{MergeCheck, Overlap};
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint, LoraDelta, Merge, ModelTables};

use super::check_free;
use crate::args::{Cli, MergeArgs, OverlapChoice};
use crate::model::misfit;
use crate::output::{note, print};

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    rows: usize,
    lora_modules: usize,
    tensors: Vec<String>,
    rewritten: Vec<PathBuf>,
    shared: Vec<PathBuf>,
    copied: Vec<PathBuf>,
    left_out: Vec<PathBuf>,
}

pub(super) fn run(args: &MergeArgs, cli: &Cli) -> Result<()> {
    let overlap = overlap(args)?;
    check_free(&args.out, cli.overwrite())?;
    let base = Checkpoint::open(&args.model)?;
    let check = if args.safe {
        MergeCheck::Finite
    } else {
        MergeCheck::Unchecked
    };
    let mut merge = Merge::new(&base)
        .overlap(overlap)
        .check(check)
        .base_check(BaseCheck::SameTable);
    for dir in &args.adapter {
        let adapter = Adapter::read(dir)?;
        let with = merge.with(dir.display().to_string(), &adapter);
        merge = with.map_err(|error| misfit(dir, error))?;
    }
    let report = merge.write(&args.out, cli.overwrite())?;
    let model = ModelTables::of(&base)?;
    if let Some(table) = merge.deltas().find_map(|delta| tied_table(&base, &model, delta)) {
        note(&format!(
            "note: the output layer is tied to {table}, so weights of LoRA change it too"
        ));
    }
    let output = Output {
        out: &args.out,
        rows: report.rows,
        lora_modules: report.lora_modules,
        tensors: report.tensors,
        rewritten: report.rewritten,
        shared: report.shared,
        copied: report.copied,
        left_out: report.left_out,
    };
    print(cli.json, &output, to_text)
}

fn overlap(args: &MergeArgs) -> Result<Overlap> {
    if args.overlap != OverlapChoice::Mean && !args.weights.is_empty() {
        bail!("--weights are for --overlap mean");
    }
    Ok(match args.overlap {
        OverlapChoice::Error => Overlap::Refuse,
        OverlapChoice::Last => Overlap::LastWins,
        OverlapChoice::Mean if args.weights.is_empty() => {
            Overlap::WeightedMean(vec![1.0; args.adapter.len()])
        }
        OverlapChoice::Mean => Overlap::WeightedMean(args.weights.clone()),
    })
}

/// The embedding that the delta is for, if the head is tied to it.
fn tied_table<'a>(base: &Checkpoint, model: &ModelTables, delta: &'a LoraDelta) -> Option<&'a str> {
    let path = base.module_name(delta.weights().path());
    let is_shared = model.shares_input_embedding(&path) && !model.tied().is_empty();
    is_shared.then(|| delta.tensor())
}

fn to_text(output: &Output<'_>) -> String {
    let mut text = format!("wrote {}: {} rows replaced", output.out.display(), output.rows);
    if output.lora_modules > 0 {
        text += &format!(", {} weights of LoRA added", output.lora_modules);
    }
    text += &format!(" in {}", names(&output.rewritten));
    if !output.shared.is_empty() {
        text += &format!("; {} linked, unchanged", names(&output.shared));
    }
    if !output.left_out.is_empty() {
        text += &format!(
            "; left out, for they hold the old weights: {}",
            names(&output.left_out)
        );
    }
    text
}

fn names(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

//! `split`: rows of tokens into a copy of the model, weights of LoRA into an adapter that trains no tokens.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use trainable_tokens_format::{Adapter, Checkpoint, split_adapter};

use super::check_free;
use crate::args::{Cli, SplitArgs};
use crate::model::misfit;
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    model: &'a Path,
    adapter: &'a Path,
    rows: usize,
    /// The modules that the new adapter has weights for.
    lora_modules: usize,
    rewritten: Vec<PathBuf>,
    shared: Vec<PathBuf>,
    copied: Vec<PathBuf>,
    left_out: Vec<PathBuf>,
}

pub(super) fn run(args: &SplitArgs, cli: &Cli) -> Result<()> {
    for out in [&args.out_model, &args.out_adapter] {
        check_free(out, cli.overwrite())?;
    }
    super::check_apart(&args.out_adapter, [args.model.as_path(), &args.adapter])?;
    super::check_apart(&args.out_model, [args.adapter.as_path()])?;
    let base = Checkpoint::open(&args.model)?;
    let adapter = Adapter::read(&args.adapter)?;
    let (out_model, out_adapter) = (&args.out_model, &args.out_adapter);
    let report = split_adapter(&base, &adapter, out_model, out_adapter, cli.overwrite());
    let report = report.map_err(|error| misfit(&args.adapter, error))?;
    let output = Output {
        model: &args.out_model,
        adapter: &args.out_adapter,
        rows: report.rows,
        lora_modules: adapter.lora_weights()?.len(),
        rewritten: report.rewritten,
        shared: report.shared,
        copied: report.copied,
        left_out: report.left_out,
    };
    print(cli.json, &output, |output| {
        format!(
            "wrote {}: {} rows replaced\nwrote {}: weights of LoRA for {} modules, no tokens",
            output.model.display(),
            output.rows,
            output.adapter.display(),
            output.lora_modules
        )
    })
}

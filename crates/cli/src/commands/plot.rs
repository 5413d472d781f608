//! `plot`: the curves of a run.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use trainable_tokens_format::write_file_atomically;

use super::check_free;
use crate::args::{Cli, PlotArgs};
use crate::history::History;
use crate::output::print;
use crate::plot::charts_svg;

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    steps: usize,
    /// The titles of the charts.
    charts: Vec<String>,
}

pub(super) fn run(args: &PlotArgs, cli: &Cli) -> Result<()> {
    let extension = args.out.extension();
    if extension.is_some_and(|extension| !extension.eq_ignore_ascii_case("svg")) {
        bail!(
            "charts are drawn as SVG, which {} does not say: name it .svg",
            args.out.display()
        );
    }
    check_free(&args.out, cli.overwrite())?;
    let history = History::read(&args.metrics)?;
    let charts = history.charts();
    let svg = charts_svg(&charts)?;
    write_file_atomically(&args.out, cli.overwrite(), |file| -> Result<()> {
        file.write_all(svg.as_bytes())
            .with_context(|| format!("cannot write {}", args.out.display()))
    })?;
    let output = Output {
        out: &args.out,
        steps: history.steps.len(),
        charts: charts.into_iter().map(|chart| chart.title).collect(),
    };
    print(cli.json, &output, |output| {
        format!(
            "wrote {}: {} of {} steps",
            output.out.display(),
            output.charts.join(", "),
            output.steps
        )
    })
}

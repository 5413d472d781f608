//! What is watched of a run, and told afterwards.

use std::path::PathBuf;

use clap::Args;

/// What is watched and told of a run.
#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Write one JSON object per step to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics: Option<PathBuf>,
    /// Write the run as one page of HTML: summary, curves, tokens, options.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Warn of rows that no gradient has reached in N steps; 0 for never.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) warn_dead_after: u64,
}

#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Metrics file of `train --metrics`.
    #[arg(value_name = "FILE")]
    pub(crate) metrics: PathBuf,
    /// SVG file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

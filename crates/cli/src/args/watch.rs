//! What is watched of a run, and told afterwards.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory as _};

use super::Cli;

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

/// The options of the command that runs, by their names: each with its value, and whether that is the default.
pub(crate) fn options_in_force() -> Vec<(String, String, bool)> {
    let mut program = Cli::command();
    program.build();
    let Ok(matches) = program.clone().try_get_matches_from(std::env::args_os()) else {
        return Vec::new();
    };
    let Some((name, matches)) = matches.subcommand() else {
        return Vec::new();
    };
    let options = program
        .find_subcommand(name)
        .into_iter()
        .flat_map(clap::Command::get_arguments);
    let options = options.filter_map(|option| {
        let id = option.get_id().as_str();
        let is_default = matches.value_source(id)? == ValueSource::DefaultValue;
        if !option.get_action().takes_values() {
            return (!is_default).then(|| {
                (
                    option.get_long().unwrap_or(id).to_owned(),
                    "yes".to_owned(),
                    false,
                )
            });
        }
        let values = matches
            .get_raw(id)?
            .map(|value| value.to_string_lossy().into_owned());
        let values: Vec<String> = values.collect();
        Some((
            option.get_long().unwrap_or(id).to_owned(),
            values.join(","),
            is_default,
        ))
    });
    options.collect()
}

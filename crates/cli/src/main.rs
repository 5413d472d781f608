//! The command line of trainable-tokens.
//!
//! Every command prints its result on standard output, as text or, with `--json`, as one JSON object; messages and
//! progress go to standard error. The exit status is 0 on success, 1 when the work failed or the input is bad, 2 for
//! wrong usage.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod initial;
mod model;
mod objective;
mod output;
mod plot;
mod summary;
mod tokens;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error, cli.verbose);
            ExitCode::FAILURE
        }
    }
}

//! The command line of trainable-tokens.
//!
//! Every command prints its result on standard output, as text or, with `--json`, as one JSON object; messages and
//! progress go to standard error. The exit status is 0 on success, 1 when the work failed or the input is bad, 2 for
//! wrong usage, 130 for a training run that was interrupted and saved.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod config_file;
mod history;
mod initial;
mod interrupt;
mod model;
mod objective;
mod output;
mod plot;
mod report;
mod rows;
mod summary;
mod tokens;

use std::process::ExitCode;

use crate::interrupt::Interrupted;

fn main() -> ExitCode {
    let cli = match config_file::parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => {
            output::report(&error, false);
            return ExitCode::FAILURE;
        }
    };
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error, cli.verbose);
            if error.is::<Interrupted>() {
                return ExitCode::from(interrupt::EXIT_STATUS);
            }
            ExitCode::FAILURE
        }
    }
}

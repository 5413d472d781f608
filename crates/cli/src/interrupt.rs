//! Ctrl-C, and the other signals that ask a program to end.

use std::fmt;
use std::path::PathBuf;
use std::process::exit;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

use crate::output::note;

/// The exit status of a run that was asked to end: a shell's for SIGINT.
pub(crate) const EXIT_STATUS: u8 = 130;

static REQUESTS: AtomicUsize = AtomicUsize::new(0);

/// From now on a first SIGINT, SIGTERM or SIGHUP (on Windows Ctrl-C and its like) is only taken note of. A second one ends the
/// program at once.
pub(crate) fn watch() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTS.fetch_add(1, Ordering::SeqCst) > 0 {
            exit(i32::from(EXIT_STATUS));
        }
        note("interrupted: this step ends and is saved; once more to end at once");
    })
    .context("cannot watch for signals")
}

/// Whether the program was asked to end.
pub(crate) fn requested() -> bool {
    REQUESTS.load(Ordering::SeqCst) > 0
}

/// A run that was asked to end, and did so with everything saved.
#[derive(Debug)]
pub(crate) struct Interrupted {
    pub(crate) step: u64,
    pub(crate) adapter: PathBuf,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, dir) = (self.step, self.adapter.display());
        write!(
            f,
            "interrupted after step {step}; the same command with --resume {dir} continues the run"
        )
    }
}

impl std::error::Error for Interrupted {}

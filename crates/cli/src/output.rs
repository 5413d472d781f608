//! What is printed.

use std::io::{self, ErrorKind, Write, stderr, stdout};

use anyhow::{Context, Result};
use serde::Serialize;

/// Prints a result: one JSON object, or the text that `text` makes of it.
pub(crate) fn print<T: Serialize>(json: bool, result: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    let mut output = if json {
        serde_json::to_string(result)?
    } else {
        text(result)
    };
    if !output.ends_with('\n') {
        output.push('\n');
    }
    let mut stdout = stdout().lock();
    match stdout.write_all(output.as_bytes()).and_then(|()| stdout.flush()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("cannot write to standard output"),
    }
}

/// Says something on standard error; a message that cannot be shown is no reason to stop.
pub(crate) fn note(message: &str) {
    let _ = writeln!(stderr().lock(), "{message}");
}

/// Shows an error as one line; its causes too if `verbose`.
pub(crate) fn report(error: &anyhow::Error, verbose: bool) {
    let mut message = one_line(&error.to_string());
    // What the system said is part of what is wrong.
    let system = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    if let Some(said) = system
        .map(ToString::to_string)
        .filter(|said| !message.contains(said))
    {
        message += &format!(": {}", one_line(&said));
    }
    note(&format!("error: {message}"));
    if verbose {
        for cause in error.chain().skip(1) {
            note(&format!("  caused by: {}", one_line(&cause.to_string())));
        }
    }
}

/// A message without the backtrace that frameworks append, its control characters (names may hold some) escaped.
fn one_line(message: &str) -> String {
    let message = message.split("\n   0: ").next().unwrap_or_default();
    message.trim_end().chars().fold(String::new(), |mut shown, c| {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        shown
    })
}

/// A size in bytes, for people.
pub(crate) fn bytes(size: u64) -> String {
    indicatif::HumanBytes(size).to_string()
}

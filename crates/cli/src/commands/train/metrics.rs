//! The file of metrics: one JSON object per step, and the summary.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::Value;
use trainable_tokens_format::{Overwrite, write_file_atomically};

/// Where metrics go, if anywhere.
pub(super) struct Metrics(Option<(BufWriter<File>, String)>);

impl Metrics {
    /// A new file in the place of an old one, or for a resumed run its old one, without what was measured after the step that
    /// the run continues from.
    pub(super) fn open(path: Option<&Path>, resumed_at: Option<u64>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self(None));
        };
        let mut options = OpenOptions::new();
        options.create(true).write(true);
        match resumed_at {
            None => options.truncate(true),
            Some(step) => {
                if path.is_file() {
                    cut(path, step)?;
                }
                options.append(true)
            }
        };
        let name = path.display().to_string();
        let file = options
            .open(path)
            .map_err(|error| anyhow!("cannot write metrics to {name}: {error}"))?;
        Ok(Self(Some((BufWriter::new(file), name))))
    }

    /// Writes a line. It is flushed: what a run has measured survives its end, whatever that is.
    pub(super) fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let Some((file, name)) = &mut self.0 else {
            return Ok(());
        };
        let text = serde_json::to_string(line)?;
        writeln!(file, "{text}")
            .and_then(|()| file.flush())
            .map_err(|error| anyhow!("cannot write metrics to {name}: {error}"))
    }
}

/// Keeps the lines of steps up to `step`; a summary belongs to the end of a run, so that it goes too.
fn cut(path: &Path, step: u64) -> Result<()> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    let mut kept = String::new();
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let value: Value = match serde_json::from_str(line) {
            Ok(value) => value,
            // A run that was killed may have left the last line unfinished.
            Err(_) if !line.ends_with('\n') => break,
            Err(error) => {
                bail!("{name}, line {number}: is no line of metrics, which a resumed run continues: {error}")
            }
        };
        if value["step"].as_u64().is_some_and(|at| at <= step) {
            kept.push_str(line.trim_end());
            kept.push('\n');
        }
    }
    if kept == text {
        return Ok(());
    }
    write_file_atomically(path, Overwrite::Replace, |file| -> Result<()> {
        file.write_all(kept.as_bytes())
            .with_context(|| format!("cannot write {name}"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_resumed_run_continues_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let read = || fs::read_to_string(&path).unwrap();
        let first = "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.4}\n";
        for rest in [
            "",
            "{\"step\":3}\n",
            "{\"step\":3}\n{\"summary\":{}}\n",
            "{\"step\":3,\"lo",
            "{\"summ",
        ] {
            fs::write(&path, format!("{first}{rest}")).unwrap();
            let mut metrics = Metrics::open(Some(&path), Some(2)).unwrap();
            metrics.write(&json!({"step": 3})).unwrap();
            assert_eq!(read(), format!("{first}{{\"step\":3}}\n"), "after {rest}");
        }
        fs::write(&path, "{\"step\":1}\nsomething else\n").unwrap();
        let error = Metrics::open(Some(&path), Some(2)).err().unwrap().to_string();
        assert!(
            error.contains("line 2") && error.contains("no line of metrics"),
            "{error}"
        );
        assert_eq!(read(), "{\"step\":1}\nsomething else\n");
        drop(Metrics::open(Some(&path), None).unwrap());
        assert_eq!(read(), "");
    }
}

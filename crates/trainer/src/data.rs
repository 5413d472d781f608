//! Training data: lines of token ids or text, batches of padded lines.

mod batch;
mod example;
mod sampler;

pub use batch::Batch;
pub use example::{Example, IGNORED};
pub use sampler::Sampler;

use std::path::{Path, PathBuf};

use example::{Limits, Line};

use crate::{Error, ModelConfig, Result, Vocabulary};

/// Windows of plain text are this long unless said otherwise (or as long as the model's positions allow).
const DEFAULT_WINDOW: usize = 512;

/// A file of examples, in memory and validated.
#[derive(Clone, Debug)]
pub struct Dataset {
    path: PathBuf,
    examples: Vec<Example>,
    pad_id: u32,
}

impl Dataset {
    /// Reads JSON Lines, each `{"input_ids": […], "labels": […]?}` or `{"text": "…"}`, or a `.txt` file, which is
    /// cut into windows of `max_length` tokens. Longer lines are cut at `max_length`; blank lines are skipped.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], and [`Error::Data`] naming the line: not JSON, ids or labels out of range, lengths that
    /// differ, no target, longer than the model's positions; [`Error::Dataset`] if no example is there.
    pub fn read(
        path: &Path,
        vocabulary: &Vocabulary,
        config: &ModelConfig,
        max_length: Option<usize>,
    ) -> Result<Self> {
        if max_length.is_some_and(|length| length < 2) {
            return Err(Error::Setting(
                "max-length must be at least 2: a token and its successor".to_owned(),
            ));
        }
        let text = std::fs::read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let text = String::from_utf8(text).map_err(|error| {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = before.split(|byte| *byte == b'\n').count();
            Error::Data {
                path: path.to_owned(),
                line,
                reason: "is not UTF-8".to_owned(),
            }
        })?;
        let examples = if path.extension().is_some_and(|extension| extension == "txt") {
            windows(path, &text, vocabulary, config, max_length)?
        } else {
            lines(path, &text, vocabulary, config, max_length)?
        };
        if examples.is_empty() {
            return Err(Error::Dataset {
                path: path.to_owned(),
                reason: "holds no example".to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            examples,
            pad_id: config.pad_token_id.unwrap_or(0),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The examples, in file order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The examples at `indices` as one batch.
    ///
    /// # Errors
    ///
    /// [`Error::Dataset`] if none of them has a target.
    pub fn batch(&self, indices: &[usize]) -> Result<Batch> {
        let examples: Vec<&Example> = indices
            .iter()
            .filter_map(|index| self.examples.get(*index))
            .collect();
        Batch::new(&examples, self.pad_id).ok_or_else(|| Error::Dataset {
            path: self.path.clone(),
            reason: format!(
                "{} have no target: every label is {IGNORED}",
                self.lines_of(indices)
            ),
        })
    }

    /// At most `length` tokens of the example at `index` around its token at `at`; none if there is no target behind it.
    pub(crate) fn window(&self, index: usize, at: usize, length: usize) -> Option<Batch> {
        let whole = self.examples.get(index)?;
        let start = at.saturating_sub(length / 2);
        let end = whole.input_ids.len().min(start + length);
        let behind = whole.labels.get(at + 1..end)?;
        behind.iter().find(|label| **label != IGNORED)?;
        let part = Example {
            input_ids: whole.input_ids.get(start..end)?.to_vec(),
            labels: whole.labels.get(start..end)?.to_vec(),
            line: whole.line,
        };
        Batch::new(&[&part], self.pad_id)
    }

    /// The lines of some examples, for messages.
    pub fn lines_of(&self, indices: &[usize]) -> String {
        let lines: Vec<String> = indices
            .iter()
            .take(8)
            .filter_map(|index| self.examples.get(*index))
            .map(|example| example.line.to_string())
            .collect();
        let more = if indices.len() > lines.len() { ", …" } else { "" };
        format!("lines {}{more}", lines.join(", "))
    }
}

/// JSON Lines.
fn lines(
    path: &Path,
    text: &str,
    vocabulary: &Vocabulary,
    config: &ModelConfig,
    max_length: Option<usize>,
) -> Result<Vec<Example>> {
    let limits = Limits::new(config.vocab_size, config.max_position_embeddings, max_length);
    let lines = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty());
    let examples = lines.map(|(number, line)| {
        let wrong = |reason: String| Error::Data {
            path: path.to_owned(),
            line: number,
            reason,
        };
        let (input_ids, labels) = match Line::parse(line, limits).map_err(wrong)? {
            Line::Ids { input_ids, labels } => (input_ids, labels),
            Line::Text(text) => {
                let ids = vocabulary.encode(&text)?;
                let labels = ids.iter().map(|id| i64::from(*id)).collect();
                (ids, labels)
            }
        };
        Example::new(input_ids, labels, number, limits).map_err(wrong)
    });
    examples.collect()
}

/// A text, cut into windows; a last window of a single token is dropped, for it has no target.
fn windows(
    path: &Path,
    text: &str,
    vocabulary: &Vocabulary,
    config: &ModelConfig,
    max_length: Option<usize>,
) -> Result<Vec<Example>> {
    let length = max_length.unwrap_or(DEFAULT_WINDOW.min(config.max_position_embeddings));
    let limits = Limits::new(config.vocab_size, config.max_position_embeddings, max_length);
    let ids = vocabulary.encode(text)?;
    let windows = (1..)
        .zip(ids.chunks(length))
        .filter(|(_, window)| window.len() > 1);
    let examples = windows.map(|(number, window)| {
        let labels = window.iter().map(|id| i64::from(*id)).collect();
        Example::new(window.to_vec(), labels, number, limits).map_err(|reason| Error::Dataset {
            path: path.to_owned(),
            reason,
        })
    });
    examples.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_its_token_and_a_target_behind_it() {
        let mut labels = vec![IGNORED; 100];
        labels[60] = 7;
        let example = Example {
            input_ids: (0..100).collect(),
            labels,
            line: 1,
        };
        let data = Dataset {
            path: PathBuf::new(),
            examples: vec![example],
            pad_id: 0,
        };
        let window = data.window(0, 55, 20).unwrap();
        assert_eq!(window.input_ids(), (45..65).collect::<Vec<u32>>());
        assert_eq!(
            (window.target_positions(), window.targets()),
            (&[14][..], &[7][..])
        );
        assert_eq!(data.window(0, 55, 1000).unwrap().length(), 100);
        assert_eq!(data.window(0, 51, 20).unwrap().length(), 20);
        for (at, length) in [(60, 20), (40, 20), (55, 8), (99, 20), (200, 20)] {
            assert!(data.window(0, at, length).is_none(), "{at} {length}");
        }
    }
}

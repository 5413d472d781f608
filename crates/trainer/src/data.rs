//! Training data: lines of token ids or text, batches of padded lines.

mod batch;
mod sampler;

pub use batch::Batch;
pub use sampler::Sampler;

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::json::parse_object;
use crate::{Error, ModelConfig, Result, Vocabulary};

/// Labels with this value are no targets, as in transformers.
pub const IGNORED: i64 = -100;

/// Windows of plain text are this long unless said otherwise (or as long as the model's positions allow).
const DEFAULT_WINDOW: usize = 512;

/// One line of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub input_ids: Vec<u32>,
    /// One label for each token, in place (the loss shifts them); [`IGNORED`] is no target.
    pub labels: Vec<i64>,
    /// The line of the file, from 1; of a text cut into windows, the number of the window.
    pub line: usize,
}

/// A file of examples, in memory and validated.
#[derive(Clone, Debug)]
pub struct Dataset {
    path: PathBuf,
    examples: Vec<Example>,
    pad_id: u32,
}

#[derive(Deserialize)]
struct Line {
    input_ids: Option<Vec<i64>>,
    labels: Option<Vec<i64>>,
    text: Option<String>,
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
    let mut examples = Vec::new();
    for (number, line) in (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let wrong = |reason: String| Error::Data {
            path: path.to_owned(),
            line: number,
            reason,
        };
        let parsed: Line = parse_object(line.as_bytes()).map_err(wrong)?;
        let (input_ids, labels) = match (parsed.input_ids, parsed.text) {
            (Some(ids), _) => {
                let labels = parsed.labels.unwrap_or_else(|| ids.clone());
                if labels.len() != ids.len() {
                    return Err(wrong(format!(
                        "{} labels for {} input_ids",
                        labels.len(),
                        ids.len()
                    )));
                }
                (check_ids(&ids, config.vocab_size).map_err(wrong)?, labels)
            }
            (None, Some(text)) => {
                let ids = vocabulary.encode(&text)?;
                let labels = ids.iter().map(|id| i64::from(*id)).collect();
                (ids, labels)
            }
            (None, None) => return Err(wrong("has neither input_ids nor text".to_owned())),
        };
        check_labels(&labels, config.vocab_size).map_err(wrong)?;
        let cut = max_length.unwrap_or(usize::MAX).min(input_ids.len());
        let example = Example {
            input_ids: input_ids[..cut].to_vec(),
            labels: labels[..cut].to_vec(),
            line: number,
        };
        check_length(&example, config).map_err(wrong)?;
        examples.push(example);
    }
    Ok(examples)
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
    let ids = vocabulary.encode(text)?;
    let mut examples = Vec::new();
    for (number, window) in (1..)
        .zip(ids.chunks(length))
        .filter(|(_, window)| window.len() > 1)
    {
        let labels = window.iter().map(|id| i64::from(*id)).collect();
        let example = Example {
            input_ids: window.to_vec(),
            labels,
            line: number,
        };
        let wrong = |reason| Error::Dataset {
            path: path.to_owned(),
            reason,
        };
        check_labels(&example.labels, config.vocab_size).map_err(wrong)?;
        check_length(&example, config).map_err(wrong)?;
        examples.push(example);
    }
    Ok(examples)
}

fn check_ids(ids: &[i64], vocab_size: usize) -> Result<Vec<u32>, String> {
    let check = |(index, id): (usize, &i64)| match u32::try_from(*id) {
        Ok(id) if (id as usize) < vocab_size => Ok(id),
        _ => Err(format!(
            "input_ids[{index}] is {id}, outside the vocabulary of {vocab_size}"
        )),
    };
    ids.iter().enumerate().map(check).collect()
}

fn check_labels(labels: &[i64], vocab_size: usize) -> Result<(), String> {
    let valid =
        |label: &i64| *label == IGNORED || usize::try_from(*label).is_ok_and(|label| label < vocab_size);
    match labels.iter().position(|label| !valid(label)) {
        None => Ok(()),
        Some(index) => Err(format!(
            "labels[{index}] is {}, neither {IGNORED} nor inside the vocabulary of {vocab_size}",
            labels[index]
        )),
    }
}

fn check_length(example: &Example, config: &ModelConfig) -> Result<(), String> {
    let length = example.input_ids.len();
    if length < 2 {
        return Err(format!("has {length} tokens, too few for a target"));
    }
    if length > config.max_position_embeddings {
        return Err(format!(
            "has {length} tokens, more than the model's {} positions; set a max-length",
            config.max_position_embeddings
        ));
    }
    Ok(())
}

//! Training data: lines of token ids or text, batches of padded lines.

mod batch;
mod example;
mod sampler;

pub use batch::Batch;
pub(crate) use batch::Predicts;
pub use example::{Example, IGNORED};
pub use sampler::Sampler;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use example::{Limits, Line};

use crate::{Error, InputSpec, Result, Vocabulary};

/// Windows of plain text are this long unless said otherwise (or as long as the model's positions allow).
const DEFAULT_WINDOW: usize = 512;

/// A file of examples, in memory and validated.
#[derive(Clone, Debug)]
pub struct Dataset {
    path: PathBuf,
    examples: Vec<Example>,
    definitions: Vec<Vec<u32>>,
    pad_id: u32,
}

/// What a file holds.
#[derive(Default)]
struct Contents {
    examples: Vec<Example>,
    definitions: Vec<Vec<u32>>,
}

impl Dataset {
    /// Reads JSON Lines, each `{"input_ids": […], "labels": […]?}` or `{"text": "…"}`, or a `.txt` file, which is
    /// cut into windows of `max_length` tokens. Longer lines are cut at `max_length`, a text before the special tokens that end
    /// it; blank lines are skipped. Lines `{"sentence": "…", "definition": "…"}`, or
    /// `{"input_ids": […], "definition_ids": […]}`, teach a word.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], and [`Error::Data`] naming the line: not JSON, ids or labels out of range, lengths that
    /// differ, no target, longer than the model's positions; [`Error::Dataset`] if no example is there.
    pub fn read(
        path: &Path,
        vocabulary: &Vocabulary,
        model: impl Into<InputSpec>,
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
        let model = model.into();
        let contents = if path.extension().is_some_and(|extension| extension == "txt") {
            windows(path, &text, vocabulary, model, max_length)?
        } else {
            lines(path, &text, vocabulary, model, max_length)?
        };
        if contents.examples.is_empty() {
            return Err(Error::Dataset {
                path: path.to_owned(),
                reason: "holds no example".to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            examples: contents.examples,
            definitions: contents.definitions,
            pad_id: model.pad_token_id.unwrap_or(0),
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

    /// The tokens of the definitions that sentences belong to, each once.
    pub fn definitions(&self) -> &[Vec<u32>] {
        &self.definitions
    }

    /// What shorter sequences are padded with.
    pub(crate) fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The examples at `indices` as one batch, in which each token predicts the next one's label.
    ///
    /// # Errors
    ///
    /// [`Error::Dataset`] if none of them has a target.
    pub fn batch(&self, indices: &[usize]) -> Result<Batch> {
        let examples: Vec<&Example> = indices
            .iter()
            .filter_map(|index| self.examples.get(*index))
            .collect();
        Batch::new(&examples, self.pad_id).ok_or_else(|| self.no_target(indices))
    }

    pub(crate) fn no_target(&self, indices: &[usize]) -> Error {
        Error::Dataset {
            path: self.path.clone(),
            reason: format!(
                "{} have no target: every label is {IGNORED}",
                self.lines_of(indices)
            ),
        }
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
    model: InputSpec,
    max_length: Option<usize>,
) -> Result<Contents> {
    let limits = Limits::new(model.vocab_size, model.max_length, max_length);
    let encode = |text: &str| match max_length {
        Some(length) => vocabulary.encode_truncated(text, length),
        None => vocabulary.encode(text),
    };
    let mut contents = Contents::default();
    let mut known = HashMap::new();
    let lines = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty());
    for (number, line) in lines {
        let wrong = |reason: String| Error::Data {
            path: path.to_owned(),
            line: number,
            reason,
        };
        let (input_ids, labels, definition) = match Line::parse(line, limits).map_err(wrong)? {
            Line::Ids { input_ids, labels } => (input_ids, labels, None),
            Line::Text(text) => (encode(&text)?, None, None),
            Line::DefinedIds {
                input_ids,
                definition_ids,
            } => (input_ids, None, Some(definition_ids)),
            Line::Defined { sentence, definition } => {
                let definition = encode(&definition)?;
                (encode(&sentence)?, None, Some(definition))
            }
        };
        let mut example = Example::new(input_ids, labels, number, limits).map_err(wrong)?;
        if let Some(definition) = definition {
            let definition = Example::new(definition, None, number, limits)
                .map_err(|reason| wrong(format!("the definition {reason}")))?
                .input_ids;
            let next = contents.definitions.len();
            let place = *known.entry(definition.clone()).or_insert(next);
            if place == next {
                contents.definitions.push(definition);
            }
            example.definition = Some(place);
        }
        contents.examples.push(example);
    }
    Ok(contents)
}

/// A text, cut into windows; a last window of a single token is dropped, for it has no target.
fn windows(
    path: &Path,
    text: &str,
    vocabulary: &Vocabulary,
    model: InputSpec,
    max_length: Option<usize>,
) -> Result<Contents> {
    let length = max_length.unwrap_or(DEFAULT_WINDOW.min(model.max_length));
    let limits = Limits::new(model.vocab_size, model.max_length, max_length);
    let ids = vocabulary.encode(text)?;
    let windows = (1..)
        .zip(ids.chunks(length))
        .filter(|(_, window)| window.len() > 1);
    let examples = windows.map(|(number, window)| {
        Example::new(window.to_vec(), None, number, limits).map_err(|reason| Error::Dataset {
            path: path.to_owned(),
            reason,
        })
    });
    Ok(Contents {
        examples: examples.collect::<Result<_>>()?,
        definitions: Vec::new(),
    })
}

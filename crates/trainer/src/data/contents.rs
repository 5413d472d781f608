//! What files of data hold.

use std::collections::HashMap;
use std::path::Path;

use super::example::{Example, Limits, Line};
use crate::{Error, InputSpec, Result, Vocabulary, file};

/// Windows of plain text are this long unless said otherwise (or as long as the model's positions allow).
const DEFAULT_WINDOW: usize = 512;

/// What files hold.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) examples: Vec<Example>,
    /// The tokens of the definitions, each once.
    pub(super) definitions: Vec<Vec<u32>>,
    /// The places of the definitions.
    known: HashMap<Vec<u32>, usize>,
}

impl Contents {
    /// Adds what a file holds: JSON Lines, or plain text in a `.txt` file.
    pub(super) fn add(
        &mut self,
        path: &Path,
        vocabulary: &Vocabulary,
        model: InputSpec,
        max_length: Option<usize>,
    ) -> Result<()> {
        let text = read_text(path)?;
        if path.extension().is_some_and(|extension| extension == "txt") {
            self.add_windows(path, &text, vocabulary, model, max_length)
        } else {
            self.add_lines(path, &text, vocabulary, model, max_length)
        }
    }

    /// JSON Lines.
    fn add_lines(
        &mut self,
        path: &Path,
        text: &str,
        vocabulary: &Vocabulary,
        model: InputSpec,
        max_length: Option<usize>,
    ) -> Result<()> {
        let limits = Limits::new(model.vocab_size, model.max_length, max_length);
        let encode = |text: &str| match max_length {
            Some(length) => vocabulary.encode_truncated(text, length),
            None => vocabulary.encode(text),
        };
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
                example.definition = Some(self.place_of(definition));
            }
            self.examples.push(example);
        }
        Ok(())
    }

    /// The place of a definition among those of all files, at the end if it is new.
    fn place_of(&mut self, definition: Vec<u32>) -> usize {
        let next = self.definitions.len();
        let place = *self.known.entry(definition.clone()).or_insert(next);
        if place == next {
            self.definitions.push(definition);
        }
        place
    }

    /// A text, cut into windows; a last window of a single token is dropped, for it has no target.
    fn add_windows(
        &mut self,
        path: &Path,
        text: &str,
        vocabulary: &Vocabulary,
        model: InputSpec,
        max_length: Option<usize>,
    ) -> Result<()> {
        let length = max_length.unwrap_or(DEFAULT_WINDOW.min(model.max_length));
        let limits = Limits::new(model.vocab_size, model.max_length, max_length);
        let ids = vocabulary.encode(text)?;
        let windows = (1..)
            .zip(ids.chunks(length))
            .filter(|(_, window)| window.len() > 1);
        for (number, window) in windows {
            let example = Example::new(window.to_vec(), None, number, limits);
            self.examples.push(example.map_err(|reason| Error::Dataset {
                path: path.to_owned(),
                reason,
            })?);
        }
        Ok(())
    }
}

/// The text of a file.
fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(file::read(path)?).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.split(|byte| *byte == b'\n').count();
        Error::Data {
            path: path.to_owned(),
            line,
            reason: "is not UTF-8".to_owned(),
        }
    })
}

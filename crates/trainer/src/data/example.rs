//! One example, and the line that it comes from.

use std::borrow::Cow;

use serde::Deserialize;

use crate::json::parse_object;

/// Labels with this value are no targets, as in transformers.
pub const IGNORED: i64 = -100;

/// One line of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub input_ids: Vec<u32>,
    /// One label for each token, in place (a causal loss shifts them); [`IGNORED`] is no target. Without labels the tokens
    /// are their own.
    pub labels: Option<Vec<i64>>,
    /// For a sentence with a definition: which of the data set's [`definitions`](super::Dataset::definitions) it is.
    pub definition: Option<usize>,
    /// The line of the file, from 1; of a text cut into windows, the number of the window.
    pub line: usize,
}

impl Example {
    /// Cuts tokens and as many labels at the longest length, and checks them.
    pub(crate) fn new(
        mut input_ids: Vec<u32>,
        mut labels: Option<Vec<i64>>,
        line: usize,
        limits: Limits,
    ) -> Result<Self, String> {
        if let Some(labels) = &mut labels {
            check_labels(labels, limits.vocab_size)?;
            labels.truncate(limits.max_length);
        }
        input_ids.truncate(limits.max_length);
        check_length(input_ids.len(), limits.max_positions)?;
        Ok(Self {
            input_ids,
            labels,
            definition: None,
            line,
        })
    }
}

impl Example {
    /// Its labels, or the tokens as their own.
    pub(crate) fn own_labels(&self) -> Cow<'_, [i64]> {
        match &self.labels {
            Some(labels) => labels.into(),
            None => self.input_ids.iter().map(|id| i64::from(*id)).collect(),
        }
    }
}

/// What examples are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    vocab_size: usize,
    max_positions: usize,
    max_length: usize,
}

impl Limits {
    /// For a model of these sizes; longer lines are cut at `max_length`.
    pub(crate) fn new(vocab_size: usize, max_positions: usize, max_length: Option<usize>) -> Self {
        Self {
            vocab_size,
            max_positions,
            max_length: max_length.unwrap_or(usize::MAX),
        }
    }
}

/// What a line of JSON Lines holds.
#[derive(Debug)]
pub(crate) enum Line {
    /// Tokens, and as many labels if there are any.
    Ids {
        /// The tokens, all in the vocabulary.
        input_ids: Vec<u32>,
        /// The labels, as they are written.
        labels: Option<Vec<i64>>,
    },
    /// A text that the tokenizer turns into tokens.
    Text(String),
    /// The tokens of a sentence and of a definition, all in the vocabulary.
    DefinedIds {
        input_ids: Vec<u32>,
        definition_ids: Vec<u32>,
    },
    /// A sentence and a definition that the tokenizer turns into tokens.
    Defined { sentence: String, definition: String },
}

#[derive(Deserialize)]
struct Fields {
    input_ids: Option<Vec<i64>>,
    labels: Option<Vec<i64>>,
    text: Option<String>,
    sentence: Option<String>,
    definition: Option<String>,
    definition_ids: Option<Vec<i64>>,
}

impl Line {
    /// Parses a line that is not blank.
    pub(crate) fn parse(line: &str, limits: Limits) -> Result<Self, String> {
        if !line.trim_start().starts_with('{') {
            return Err("is no JSON object: data is JSON Lines, one object a line".to_owned());
        }
        let fields: Fields = parse_object(line.as_bytes())?;
        let check = |name, ids: &[i64]| check_ids(name, ids, limits.vocab_size);
        if let Some(ids) = fields.input_ids {
            let input_ids = check("input_ids", &ids)?;
            if let Some(definition) = fields.definition_ids {
                let definition_ids = check("definition_ids", &definition)?;
                return Ok(Self::DefinedIds {
                    input_ids,
                    definition_ids,
                });
            }
            if let Some(labels) = fields.labels.as_ref().filter(|labels| labels.len() != ids.len()) {
                return Err(format!("{} labels for {} input_ids", labels.len(), ids.len()));
            }
            let labels = fields.labels;
            return Ok(Self::Ids { input_ids, labels });
        }
        match (fields.text, fields.sentence, fields.definition) {
            (Some(text), _, _) => Ok(Self::Text(text)),
            (None, Some(sentence), Some(definition)) => Ok(Self::Defined { sentence, definition }),
            (None, Some(_), None) => Err("has a sentence, but no definition".to_owned()),
            (None, None, _) => {
                Err("has neither input_ids nor text, nor a sentence with a definition".to_owned())
            }
        }
    }
}

fn check_ids(name: &str, ids: &[i64], vocab_size: usize) -> Result<Vec<u32>, String> {
    let check = |(index, id): (usize, &i64)| match u32::try_from(*id) {
        Ok(id) if (id as usize) < vocab_size => Ok(id),
        _ => Err(format!(
            "{name}[{index}] is {id}, outside the vocabulary of {vocab_size}"
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

fn check_length(length: usize, max_positions: usize) -> Result<(), String> {
    if length < 2 {
        return Err(format!("has {length} tokens, too few for a target"));
    }
    if length > max_positions {
        return Err(format!(
            "has {length} tokens, more than the model's {max_positions} positions; set a max-length"
        ));
    }
    Ok(())
}

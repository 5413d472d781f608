//! What a text is made of: the pieces of a token's string, or of a description.

use std::cell::OnceCell;
use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::Vocabulary;
use crate::{Error, Result};

/// The tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// Their ids, without special tokens that a tokenizer adds and without the unknown token; at least one.
    pub ids: Vec<u32>,
    /// How many parts of the text the tokenizer does not know.
    pub unknown: usize,
}

impl Vocabulary {
    /// This vocabulary as if the tokens `ids` had never been added: their strings encode to the pieces that they had
    /// before. Every other token keeps its id.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`], [`Error::Read`].
    pub fn without(&self, ids: &[u32]) -> Result<Self> {
        let bytes = self.read()?;
        let mut tokenizer: Value =
            serde_json::from_slice(&bytes).map_err(|error| self.error(&error.to_string().into()))?;
        hide(&mut tokenizer, &ids.iter().map(|id| u64::from(*id)).collect());
        let bytes = serde_json::to_vec(&tokenizer).map_err(|error| self.error(&error.to_string().into()))?;
        let tokenizer = self.plain(Tokenizer::from_bytes(bytes))?;
        Ok(Self {
            path: self.path.clone(),
            tokenizer: OnceCell::from(tokenizer),
        })
    }

    /// The tokens of a text that is part of a sentence: no special tokens around it, and no space before it that the
    /// text itself has not.
    ///
    /// # Errors
    ///
    /// [`Error::NoPieces`] if the tokenizer knows nothing of it; [`Error::Tokenizer`], [`Error::Read`].
    pub fn pieces(&self, text: &str) -> Result<Pieces> {
        let mut all = self.encode_with(text, false)?;
        let refused = |reason| Error::NoPieces {
            text: text.to_owned(),
            reason,
        };
        if all.is_empty() {
            return Err(refused("encodes to no token; give a text that it stands for"));
        }
        // SentencePiece puts a space before a text: where it is a token of its own, it says nothing.
        if all.len() > 1 && !text.starts_with(' ') && self.is_lone_space(all[0])? {
            all.remove(0);
        }
        let mut ids = Vec::new();
        for id in &all {
            let unknown = match self.token(*id)? {
                Some(token) => token != text && self.is_unknown(&token)?,
                None => false,
            };
            if !unknown {
                ids.push(*id);
            }
        }
        if ids.is_empty() {
            return Err(refused(
                "is unknown to the tokenizer: it encodes to the unknown token alone; give a text that it stands for",
            ));
        }
        Ok(Pieces {
            unknown: all.len() - ids.len(),
            ids,
        })
    }

    /// The text that a token stands for: its string, with the tokenizer's marker of a space turned into a space.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`], [`Error::Read`].
    pub fn text(&self, id: u32) -> Result<Option<String>> {
        let tokenizer = self.load()?;
        let added = tokenizer
            .get_added_tokens_decoder()
            .get(&id)
            .map(|token| token.content.clone());
        let Some(string) = added.clone().or_else(|| tokenizer.id_to_token(id)) else {
            return Ok(None);
        };
        let marker = self.space_marker()?;
        let text = match marker.and_then(|marker| string.strip_prefix(marker)) {
            Some(rest) if added.is_some() => format!(" {rest}"),
            None if added.is_some() => string,
            // A string of the model is in the model's own spelling, such as byte-level BPE's.
            _ => self.decode(&[id])?,
        };
        // A space that the tokenizer puts there itself must not be there twice.
        let puts_space = match (marker, self.encode_with("a", false)?.first()) {
            (Some(marker), Some(first)) => self.token(*first)?.is_some_and(|token| token.starts_with(marker)),
            _ => false,
        };
        Ok(Some(match text.strip_prefix(' ') {
            Some(rest) if puts_space && !rest.is_empty() => rest.to_owned(),
            _ => text,
        }))
    }

    /// What stands for a space at the start of a token: `Ġ` in byte-level BPE, `▁` in SentencePiece.
    fn space_marker(&self) -> Result<Option<char>> {
        let Some(first) = self.encode_with(" a", false)?.first().copied() else {
            return Ok(None);
        };
        let token = self.token(first)?.unwrap_or_default();
        Ok(token.chars().next().filter(|c| matches!(c, 'Ġ' | '▁')))
    }

    fn is_lone_space(&self, id: u32) -> Result<bool> {
        Ok(self.token(id)?.is_some_and(|token| token == "▁" || token == "Ġ"))
    }
}

/// Gives tokens strings that occur in no text. They keep their ids: removed, the others' ids would move.
fn hide(tokenizer: &mut Value, ids: &HashSet<u64>) {
    // A noncharacter of Unicode.
    let hidden = |id: u64| format!("\u{10ffff}{id}");
    let chosen = |id: &Value| id.as_u64().filter(|id| ids.contains(id));
    for added in tokenizer["added_tokens"].as_array_mut().into_iter().flatten() {
        if let Some(id) = chosen(&added["id"]) {
            added["content"] = json!(hidden(id));
        }
    }
    let mut names = HashSet::new();
    match &mut tokenizer["model"]["vocab"] {
        Value::Object(vocab) => {
            let found = vocab
                .iter()
                .filter_map(|(name, id)| Some((name.clone(), chosen(id)?)));
            for (name, id) in found.collect::<Vec<_>>() {
                vocab.remove(&name);
                vocab.insert(hidden(id), json!(id));
                names.insert(name);
            }
        }
        // Unigram: the id is the place in the list.
        Value::Array(vocab) => {
            for (id, entry) in (0u64..).zip(vocab) {
                if ids.contains(&id) {
                    entry[0] = json!(hidden(id));
                }
            }
        }
        _ => {}
    }
    let prefix = tokenizer["model"]["continuing_subword_prefix"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    if let Some(merges) = tokenizer["model"]["merges"].as_array_mut() {
        let known = |(left, right): (&str, &str)| {
            let whole = format!("{left}{}", right.strip_prefix(prefix.as_str()).unwrap_or(right));
            ![left, right, &whole].iter().any(|name| names.contains(*name))
        };
        merges.retain(|merge| match merge {
            Value::String(pair) => pair.split_once(' ').is_none_or(known),
            pair => match (pair[0].as_str(), pair[1].as_str()) {
                (Some(left), Some(right)) => known((left, right)),
                _ => true,
            },
        });
    }
}

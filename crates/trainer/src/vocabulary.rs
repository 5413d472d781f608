//! Token strings and ids of a model.

mod added;
mod context;
mod pieces;
mod special;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

pub use added::{AddedTokens, TokenFlags, TokenKind};
pub use context::{Context, MissedContext};
pub use pieces::Pieces;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use crate::{Error, Result, file};

/// A model's `tokenizer.json`, loaded when it is first needed.
#[derive(Debug)]
pub struct Vocabulary {
    path: PathBuf,
    tokenizer: OnceCell<Tokenizer>,
}

impl Vocabulary {
    /// The tokenizer of a model directory; nothing is read yet.
    pub fn of_model(dir: &Path) -> Self {
        Self {
            path: dir.join("tokenizer.json"),
            tokenizer: OnceCell::new(),
        }
    }

    /// Whether the model has a tokenizer.
    pub fn exists(&self) -> bool {
        self.path.is_file()
    }

    /// The ids of a text, with the special tokens that the tokenizer adds.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The ids of a text as by [`encode`](Self::encode), at most `max_length` of them: cut at the end of the text as tokenizers
    /// cut it, so that the special tokens stay.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the special tokens leave no room; [`Error::Tokenizer`].
    pub fn encode_truncated(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let all = self.encode(text)?;
        if all.len() <= max_length {
            return Ok(all);
        }
        let tokenizer = self.load()?;
        let special = tokenizer
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(false));
        if special >= max_length {
            return Err(Error::Setting(format!(
                "max-length {max_length} leaves no room for text: the tokenizer adds {special} special tokens"
            )));
        }
        let truncated = || {
            let mut encoding = tokenizer.encode_fast(text, false)?;
            encoding.truncate(max_length - special, 0, TruncationDirection::Right);
            tokenizer.post_process(encoding, None, true)
        };
        let encoding = truncated().map_err(|error| self.error(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens included.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.load()?
            .decode(ids, false)
            .map_err(|error| self.error(&error))
    }

    /// The string of a token, if the tokenizer knows it: of an added token as it was added, of others as the model spells it.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn token(&self, id: u32) -> Result<Option<String>> {
        // The library tells added tokens as their normalizer makes them, such as in lower case.
        let added = self.added_token(id)?.map(|token| token.content);
        Ok(added.or(self.load()?.id_to_token(id)))
    }

    /// The id of a string that encodes to exactly one token.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneToken`], showing what it encodes to; [`Error::Tokenizer`].
    pub fn single_id(&self, token: &str) -> Result<u32> {
        let ids = self.encode_with(token, false)?;
        let not_one = |reason| Error::NotOneToken {
            token: token.to_owned(),
            reason,
        };
        match ids.as_slice() {
            [id] => match self.token(*id)? {
                // A model with an unknown token maps every foreign string to it.
                Some(found) if self.is_unknown(&found)? && found != token => Err(not_one(format!(
                    "is unknown to the tokenizer: it encodes to {id} ('{found}')"
                ))),
                _ => Ok(*id),
            },
            [] => Err(not_one("encodes to nothing".to_owned())),
            several => Err(not_one(format!(
                "encodes to {} ids, not one: {}",
                several.len(),
                self.shown(several)?
            ))),
        }
    }

    fn is_unknown(&self, token: &str) -> Result<bool> {
        use tokenizers::ModelWrapper::{BPE, Unigram, WordLevel, WordPiece};
        let tokenizer = self.load()?;
        Ok(match tokenizer.get_model() {
            BPE(model) => model.unk_token.as_deref() == Some(token),
            WordLevel(model) => model.unk_token == token,
            WordPiece(model) => model.unk_token == token,
            Unigram(_) => token == "<unk>",
        })
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .load()?
            .encode_fast(text, special)
            .map_err(|error| self.error(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn load(&self) -> Result<&Tokenizer> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = self.plain(Tokenizer::from_bytes(file::read(&self.path)?))?;
        Ok(self.tokenizer.get_or_init(|| tokenizer))
    }

    /// Padding and truncation are the data set's business.
    fn plain(&self, tokenizer: tokenizers::Result<Tokenizer>) -> Result<Tokenizer> {
        let mut tokenizer = tokenizer.map_err(|error| self.error(&error))?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| self.error(&error))?;
        Ok(tokenizer)
    }

    fn error(&self, error: &tokenizers::Error) -> Error {
        let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
        Error::Tokenizer {
            path: self.path.clone(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tokenizers::TruncationParams;

    use super::*;

    /// A tokenizer of words `a` to `h`, with `[CLS]` and `[SEP]`, in a directory.
    fn tokenizer(post_processor: &Value) -> tempfile::TempDir {
        let words = ["[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g", "h"];
        let vocab: serde_json::Map<_, _> = (0..)
            .zip(words)
            .map(|(id, word)| (word.to_owned(), json!(id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": post_processor, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        dir
    }

    #[test]
    fn texts_are_cut_as_the_tokenizers_library_cuts_them() {
        let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
        let one = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let at_the_end = json!({
            "type": "TemplateProcessing", "single": [text, one("[SEP]")], "pair": [text, one("[SEP]")],
            "special_tokens": {"[SEP]": special("[SEP]", 1)},
        });
        let bert = json!({"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]});
        let roberta = json!({
            "type": "RobertaProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0], "trim_offsets": true,
            "add_prefix_space": true,
        });
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let both = json!({"type": "Sequence", "processors": [bytes, at_the_end]});
        for (post_processor, added) in [
            (json!(null), 0),
            (at_the_end, 1),
            (both, 1),
            (bert, 2),
            (roberta, 2),
        ] {
            let dir = tokenizer(&post_processor);
            let vocabulary = Vocabulary::of_model(dir.path());
            for max_length in added + 1..10 {
                let mut library = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
                let truncation = TruncationParams {
                    max_length,
                    ..TruncationParams::default()
                };
                library.with_truncation(Some(truncation)).unwrap();
                for text in ["a b c d e f g h", "h g", ""] {
                    let ours = vocabulary.encode_truncated(text, max_length).unwrap();
                    let theirs = library.encode(text, true).unwrap();
                    assert_eq!(ours, theirs.get_ids(), "{post_processor}, {max_length}, '{text}'");
                }
            }
            if added > 0 {
                let error = vocabulary
                    .encode_truncated("a b c", added)
                    .unwrap_err()
                    .to_string();
                assert!(
                    error.contains(&format!("max-length {added} leaves no room")),
                    "{error}"
                );
            }
        }
    }
}

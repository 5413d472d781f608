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
use tokenizers::Tokenizer;

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

//! Special tokens.

use super::Vocabulary;
use crate::Result;

/// Names that tokenizers give the token that stands for a masked one.
const MASKS: [&str; 2] = ["[MASK]", "<mask>"];

impl Vocabulary {
    /// The token that stands for a masked one: `[MASK]` or `<mask>`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn mask_token(&self) -> Result<Option<u32>> {
        let tokenizer = self.load()?;
        Ok(MASKS.iter().find_map(|name| tokenizer.token_to_id(name)))
    }

    /// The tokens that are marked as special, ascending.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn special_tokens(&self) -> Result<Vec<u32>> {
        let added = self.load()?.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special);
        let mut ids: Vec<u32> = special.map(|(id, _)| id).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// How many tokens there are, added ones too.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn num_tokens(&self) -> Result<u32> {
        let count = self.load()?.get_vocab_size(true);
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }
}

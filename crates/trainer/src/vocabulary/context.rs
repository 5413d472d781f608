//! Whether a token that was added to a tokenizer is found inside a sentence.

use tokenizers::AddedToken;

use super::Vocabulary;
use crate::Result;

/// A place in a sentence where a token should be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Before a space and a word.
    Start,
    /// Between two words, with a space on either side.
    AfterSpace,
    /// Between two letters, without spaces.
    BetweenLetters,
}

/// A text in which a token occurs, but is not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissedContext {
    /// Where in the text the token stands.
    pub context: Context,
    /// The text.
    pub text: String,
    /// What it encodes to: ids with their strings.
    pub encodes_to: String,
    /// Whether the token is a special one, which should be found everywhere.
    pub special: bool,
}

impl Vocabulary {
    /// The sentences in which the tokenizer does not find an added token, though they hold its string; none for a token of
    /// the model's own vocabulary, which is found where the model's rules say so.
    ///
    /// A token that must be a single word (`single_word`) is not looked for between letters. Spaces that a token takes with
    /// it (`lstrip`, `rstrip`) change nothing here: its id is there all the same.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`](crate::Error::Tokenizer), [`Error::Read`](crate::Error::Read).
    pub fn missed_contexts(&self, id: u32) -> Result<Vec<MissedContext>> {
        let Some(token) = self.added_token(id)? else {
            return Ok(Vec::new());
        };
        let text = &token.content;
        // A letter that cannot be mistaken for part of the token.
        let letter = ('a'..='z').find(|letter| !text.to_lowercase().contains(*letter));
        let letter = letter.unwrap_or('a');
        let contexts = [
            (Context::Start, format!("{text} {letter}")),
            (Context::AfterSpace, format!("{letter} {text} {letter}")),
            (Context::BetweenLetters, format!("{letter}{text}{letter}")),
        ];
        let mut missed = Vec::new();
        for (context, sentence) in contexts {
            if context == Context::BetweenLetters && token.single_word {
                continue;
            }
            let ids = self.encode_with(&sentence, false)?;
            if ids.iter().filter(|other| **other == id).count() != 1 {
                missed.push(MissedContext {
                    context,
                    encodes_to: self.shown(&ids)?,
                    text: sentence,
                    special: token.special,
                });
            }
        }
        Ok(missed)
    }

    /// The entry of a token that was added to the tokenizer.
    pub(super) fn added_token(&self, id: u32) -> Result<Option<AddedToken>> {
        let added = self.load()?.get_added_vocabulary().get_added_tokens_decoder();
        Ok(added.get(&id).cloned())
    }

    /// Ids with their strings, for messages.
    pub(super) fn shown(&self, ids: &[u32]) -> Result<String> {
        let shown = ids
            .iter()
            .map(|id| Ok(format!("{id} ('{}')", self.token(*id)?.unwrap_or_default())));
        Ok(shown.collect::<Result<Vec<_>>>()?.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    /// Words over a list, in lower case if `normalizer` says so, with one added token.
    fn vocabulary(normalizer: &Value, added: &[Value]) -> (tempfile::TempDir, Vocabulary) {
        let words = ["[UNK]", "a", "b", "c", "##a", "##b", "##c", "dax"];
        let vocab: serde_json::Map<_, _> = (0..)
            .zip(words)
            .map(|(id, word)| (word.to_owned(), json!(id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null,
            "decoder": null, "model": {"type": "WordPiece", "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab},
        });
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let vocabulary = Vocabulary::of_model(dir.path());
        vocabulary.load().unwrap();
        (dir, vocabulary)
    }

    fn added(content: &str, flags: &[&str]) -> Value {
        let has = |flag| flags.contains(&flag);
        json!({"id": 8, "content": content, "single_word": has("single_word"), "lstrip": has("lstrip"),
            "rstrip": has("rstrip"), "normalized": has("normalized"), "special": has("special")})
    }

    #[test]
    fn tokens_are_found_wherever_their_flags_let_them() {
        for flags in [
            &["special"][..],
            &["normalized"],
            &["normalized", "lstrip"],
            &["special", "rstrip"],
            &["special", "lstrip", "rstrip"],
            &["normalized", "single_word"],
            &["special", "single_word"],
        ] {
            let (_dir, vocabulary) = vocabulary(&Value::Null, &[added("<b>", flags)]);
            assert_eq!(vocabulary.single_id("<b>").unwrap(), 8);
            assert_eq!(vocabulary.missed_contexts(8).unwrap(), [], "{flags:?}");
            let between = vocabulary.encode("a<b>a").unwrap();
            assert_eq!(between.contains(&8), !flags.contains(&"single_word"), "{flags:?}");
        }
    }

    #[test]
    fn an_added_token_keeps_the_case_it_was_added_in() {
        let (_dir, vocabulary) = vocabulary(&json!({"type": "Lowercase"}), &[added("<B>", &["normalized"])]);
        assert_eq!(vocabulary.single_id("<B>").unwrap(), 8);
        assert_eq!(vocabulary.token(8).unwrap().as_deref(), Some("<B>"));
        assert_eq!(vocabulary.missed_contexts(8).unwrap(), []);
    }

    #[test]
    fn what_a_text_encodes_to_instead_is_said() {
        // Alone the text becomes `_<b>`, and so does the token; between letters there is no `_`.
        let prepend = json!({"type": "Prepend", "prepend": "_"});
        let (_dir, vocabulary) = vocabulary(&prepend, &[added("<b>", &["normalized", "special"])]);
        assert_eq!(vocabulary.single_id("<b>").unwrap(), 8);
        let missed = vocabulary.missed_contexts(8).unwrap();
        let contexts: Vec<_> = missed.iter().map(|missed| missed.context).collect();
        assert_eq!(contexts, [Context::AfterSpace, Context::BetweenLetters]);
        assert_eq!(missed[1].text, "a<b>a");
        assert!(missed[1].special);
        assert!(missed[1].encodes_to.contains("2 ('b')"), "{missed:?}");
        // A word of the model is found where the model's rules say so.
        assert_eq!(vocabulary.missed_contexts(7).unwrap(), []);
    }
}

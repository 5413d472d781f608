//! What a text is made of: the pieces of a token's string, or of a description.

use std::cell::OnceCell;
use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::Vocabulary;
use crate::{Error, Result, file};

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
        let bytes = file::read(&self.path)?;
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
        let added = self.added_token(id)?;
        let Some(string) = self.token(id)? else {
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

    /// What stands for a space at the start of a token: `Ġ` in byte-level BPE, `▁` in `SentencePiece`.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The directory must outlive the vocabulary: `without` reads the file again.
    fn vocabulary(tokenizer: &Value) -> (tempfile::TempDir, Vocabulary) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let vocabulary = Vocabulary::of_model(dir.path());
        vocabulary.load().unwrap();
        (dir, vocabulary)
    }

    fn added(id: u32, content: &str) -> Value {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        })
    }

    fn tokenizer(model: &Value, added: &[Value], parts: &Value) -> Value {
        let mut tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "model": model,
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        });
        for (key, value) in parts.as_object().unwrap() {
            tokenizer[key] = value.clone();
        }
        tokenizer
    }

    /// Byte-level BPE, of which `Ġdog` is a word of the model.
    fn byte_level(more: &[Value]) -> (tempfile::TempDir, Vocabulary) {
        let words = [
            "<", ">", "d", "o", "g", "Ġ", "s", "é", "do", "Ġdo", "Ġdog", "dog", "Ã", "©",
        ];
        let vocab: serde_json::Map<_, _> = (0..)
            .zip(words)
            .map(|(id, word)| (word.to_owned(), json!(id)))
            .collect();
        let level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
        vocabulary(&tokenizer(
            &json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [["d", "o"], ["Ġ", "do"], ["Ġdo", "g"], ["do", "g"]],
            }),
            more,
            &json!({"pre_tokenizer": level, "decoder": level}),
        ))
    }

    /// The pieces of a token without `hidden`.
    fn sub_tokens(vocabulary: &Vocabulary, id: u32, hidden: &[u32]) -> (String, Vec<String>) {
        let text = vocabulary.text(id).unwrap().unwrap();
        let pieces = vocabulary.without(hidden).unwrap().pieces(&text).unwrap();
        assert_eq!(pieces.unknown, 0);
        let strings = pieces
            .ids
            .iter()
            .map(|id| vocabulary.token(*id).unwrap().unwrap());
        (text, strings.collect())
    }

    #[track_caller]
    fn assert_pieces(vocabulary: &Vocabulary, id: u32, hidden: &[u32], text: &str, pieces: &[&str]) {
        let got = sub_tokens(vocabulary, id, hidden);
        assert_eq!(
            got,
            (text.to_owned(), pieces.iter().map(ToString::to_string).collect())
        );
    }

    #[test]
    fn byte_level_tokens_have_the_pieces_they_had_before() {
        let words = ["<dogs>", " dogs", "Ġdogs", "dogdog", "dogs"];
        let added: Vec<Value> = (14..).zip(words).map(|(id, word)| added(id, word)).collect();
        let (_dir, vocabulary) = byte_level(&added);
        let all = [14, 15, 16, 17, 18];
        assert_pieces(&vocabulary, 14, &all, "<dogs>", &["<", "dog", "s", ">"]);
        assert_pieces(&vocabulary, 15, &all, " dogs", &["Ġdog", "s"]);
        // Added with the model's spelling of a space.
        assert_pieces(&vocabulary, 16, &all, " dogs", &["Ġdog", "s"]);
        assert_pieces(&vocabulary, 17, &all, "dogdog", &["dog", "dog"]);
        // Tokens that stay keep their ids, and are pieces like others.
        assert_pieces(&vocabulary, 14, &[14, 15], "<dogs>", &["<", "dogs", ">"]);
        // Words of the model itself: without them, their merges are gone too.
        assert_pieces(&vocabulary, 10, &[10], " dog", &["Ġdo", "g"]);
        assert_pieces(&vocabulary, 10, &[10, 9], " dog", &["Ġ", "dog"]);
        assert_pieces(&vocabulary, 11, &[11, 8], "dog", &["d", "o", "g"]);
        assert_eq!(vocabulary.text(99).unwrap(), None);
        assert_eq!(vocabulary.text(5).unwrap().as_deref(), Some(" "));
        // A character that has no token left.
        assert!(matches!(
            vocabulary.without(&[2]).unwrap().pieces("d"),
            Err(Error::NoPieces { .. })
        ));
        assert!(matches!(vocabulary.pieces(""), Err(Error::NoPieces { .. })));
        assert_eq!(vocabulary.pieces("é").unwrap().ids, [12, 13]);
    }

    #[test]
    fn sentencepiece_tokens_have_one_space_before_them() {
        let scores = ["<unk>", "▁", "▁dog", "dog", "s", "<", ">", "▁dogs"];
        let vocab: Vec<Value> = scores.iter().map(|word| json!([word, -1.0])).collect();
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let (_dir, vocabulary) = vocabulary(&tokenizer(
            &json!({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false}),
            &[added(8, "<dogs>"), added(9, "▁dogdog"), added(10, " dogdog")],
            &json!({"pre_tokenizer": metaspace, "decoder": metaspace}),
        ));
        let all = [8, 9, 10];
        // The space that is put before the text is a piece of its own here, and says nothing.
        assert_pieces(&vocabulary, 8, &all, "<dogs>", &["<", "dog", "s", ">"]);
        assert_pieces(&vocabulary, 9, &all, "dogdog", &["▁dog", "dog"]);
        assert_pieces(&vocabulary, 10, &all, "dogdog", &["▁dog", "dog"]);
        assert_pieces(&vocabulary, 7, &[7], "dogs", &["▁dog", "s"]);
        let unknown = vocabulary.pieces("dog é").unwrap();
        assert_eq!((unknown.ids, unknown.unknown), (vec![2, 1], 1));
    }

    #[test]
    fn spaces_written_by_a_normalizer_are_not_doubled() {
        let words = ["<unk>", "▁", "d", "o", "g", "s", "do", "dog", "▁dog"];
        let vocab: serde_json::Map<_, _> = (0..)
            .zip(words)
            .map(|(id, word)| (word.to_owned(), json!(id)))
            .collect();
        let (_dir, vocabulary) = vocabulary(&tokenizer(
            &json!({
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": ["d o", "do g", "▁ dog"],
            }),
            &[added(9, " dogs"), added(10, "?")],
            &json!({
                "normalizer": {"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ]},
                "decoder": {"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ]},
            }),
        ));
        assert_pieces(&vocabulary, 9, &[9, 10], "dogs", &["▁dog", "s"]);
        assert_pieces(&vocabulary, 8, &[8], "dog", &["dog"]);
        let question = vocabulary.without(&[9, 10]).unwrap().pieces("?");
        let error = question.unwrap_err().to_string();
        assert!(error.contains("'?'") && error.contains("unknown"), "{error}");
    }

    #[test]
    fn a_word_of_a_word_list_has_no_pieces() {
        let (_dir, vocabulary) = vocabulary(&tokenizer(
            &json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {"[UNK]": 0, "dog": 1, "##s": 2, "dogs": 3, "cat": 4}}),
            &[added(5, "[DOGS]")],
            &json!({"pre_tokenizer": {"type": "Whitespace"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false}}),
        ));
        assert_pieces(&vocabulary, 3, &[3], "dogs", &["dog", "##s"]);
        assert!(matches!(
            vocabulary.without(&[4]).unwrap().pieces("cat"),
            Err(Error::NoPieces { .. })
        ));
        let some = vocabulary.without(&[5]).unwrap().pieces("[ cat ]").unwrap();
        assert_eq!((some.ids, some.unknown), (vec![4], 2));
    }
}

//! Tokens that are added to a tokenizer.

use std::cell::OnceCell;
use std::path::PathBuf;

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, NormalizedString, Normalizer as _, Tokenizer};

use super::Vocabulary;
use crate::{Error, Result, file};

/// How a tokenizer finds an added token: the flags of `AddedToken` in Hugging Face's tokenizers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenFlags {
    /// Special or normal.
    pub kind: TokenKind,
    /// Takes in the spaces before it.
    pub lstrip: bool,
    /// Takes in the spaces after it.
    pub rstrip: bool,
    /// Is not found next to a letter or a digit.
    pub single_word: bool,
}

/// What an added token is to the tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenKind {
    /// Found in the text as it stands, left out when decoding skips special tokens.
    #[default]
    Special,
    /// Part of the text, found after the tokenizer has normalized it.
    Normal,
}

/// A vocabulary with tokens that were added to it.
#[derive(Debug)]
pub struct AddedTokens {
    /// The vocabulary with them; its file is still the old one.
    pub vocabulary: Vocabulary,
    /// Their ids, in the order given.
    pub ids: Vec<u32>,
    /// The files that say so, by their names in the model's directory: `tokenizer.json`, and those beside it that list added
    /// tokens too.
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

/// Files and the fields of them that list special tokens which have no role of their own: transformers 4 and 5.
const SPECIAL_LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

impl Vocabulary {
    /// Adds tokens, as `add_tokens` of Python's tokenizers does: they get the ids after the vocabulary's last. Nothing is
    /// written. `tokenizer.json` is written anew by the tokenizers library; in `tokenizer_config.json`,
    /// `special_tokens_map.json` and `added_tokens.json`, if there, the lists that are there get the tokens too.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneToken`] for a token that is empty, given twice, or in the vocabulary already;
    /// [`Error::Tokenizer`] if a file is not what it should be, or if the ids after the last are not free;
    /// [`Error::Read`].
    pub fn add(&self, tokens: &[String], flags: TokenFlags) -> Result<AddedTokens> {
        for (at, token) in tokens.iter().enumerate() {
            self.expect_new(token, &tokens[..at], flags.kind)?;
        }
        let mut tokenizer =
            Tokenizer::from_bytes(file::read(&self.path)?).map_err(|error| self.error(&error))?;
        let special = flags.kind == TokenKind::Special;
        let added = tokens.iter().map(|token| {
            AddedToken::from(token, special)
                .lstrip(flags.lstrip)
                .rstrip(flags.rstrip)
                .single_word(flags.single_word)
        });
        let added: Vec<_> = added.collect();
        let outcome = if special {
            tokenizer.add_special_tokens(added.clone())
        } else {
            tokenizer.add_tokens(added.clone())
        };
        outcome.map_err(|error| self.error(&error))?;
        let mut ids = Vec::new();
        for token in tokens {
            ids.push(self.new_id(&tokenizer, token)?);
        }
        let text = tokenizer.to_string(true).map_err(|error| self.error(&error))?;
        let mut files = vec![(PathBuf::from("tokenizer.json"), text.clone().into_bytes())];
        files.extend(self.side_files(&ids, &added)?);
        // Loaded again: an id that the file does not keep must not get a row.
        let again = self.plain(Tokenizer::from_bytes(text))?;
        let vocabulary = Self {
            path: self.path.clone(),
            tokenizer: OnceCell::from(again),
        };
        for (token, id) in tokens.iter().zip(&ids) {
            let found = vocabulary.single_id(token)?;
            if found != *id {
                return Err(
                    self.error(&format!("token '{token}' got id {id}, but encodes to {found}").into())
                );
            }
        }
        Ok(AddedTokens {
            vocabulary,
            ids,
            files,
        })
    }

    fn expect_new(&self, token: &str, before: &[String], kind: TokenKind) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::NotOneToken {
                token: token.to_owned(),
                reason,
            })
        };
        if token.is_empty() {
            return refuse("is empty, so no text holds it".to_owned());
        }
        if before.iter().any(|other| other == token) {
            return refuse("is given twice".to_owned());
        }
        let tokenizer = self.load()?;
        if let Some(id) = tokenizer.token_to_id(token) {
            return refuse(format!("is in the vocabulary already, with token id {id}"));
        }
        let Some(normalizer) = tokenizer.get_normalizer().filter(|_| kind == TokenKind::Normal) else {
            return Ok(());
        };
        let mut text = NormalizedString::from(token);
        normalizer
            .normalize(&mut text)
            .map_err(|error| self.error(&error))?;
        match tokenizer.token_to_id(text.get()) {
            None => Ok(()),
            Some(id) => refuse(format!(
                "becomes '{}' by the tokenizer's normalizer, which is in the vocabulary already, with token id {id}; \
                 add it as a special token",
                text.get()
            )),
        }
    }

    fn new_id(&self, tokenizer: &Tokenizer, token: &str) -> Result<u32> {
        let id = tokenizer
            .token_to_id(token)
            .ok_or_else(|| self.error(&format!("token '{token}' was not added").into()))?;
        match self.token(id)? {
            None => Ok(id),
            Some(other) => Err(self.error(
                &format!("token '{token}' would get id {id}, which is that of '{other}': the ids have gaps")
                    .into(),
            )),
        }
    }

    /// The files beside `tokenizer.json` that list added tokens, with the new ones.
    fn side_files(&self, ids: &[u32], added: &[AddedToken]) -> Result<Vec<(PathBuf, Vec<u8>)>> {
        let mut files = Vec::new();
        for name in [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ] {
            let path = self.path.with_file_name(name);
            if !path.is_file() {
                continue;
            }
            let wrong = |reason: String| Error::Tokenizer {
                path: path.clone(),
                reason,
            };
            let before: Map<String, Value> =
                serde_json::from_slice(&file::read(&path)?).map_err(|error| wrong(error.to_string()))?;
            let mut fields = before.clone();
            if name == "added_tokens.json" {
                fields.extend(
                    added
                        .iter()
                        .zip(ids)
                        .map(|(token, id)| (token.content.clone(), json!(id))),
                );
            } else {
                list(&mut fields, ids, added);
            }
            if fields != before {
                let text = serde_json::to_string_pretty(&fields).map_err(|error| wrong(error.to_string()))?;
                files.push((PathBuf::from(name), (text + "\n").into_bytes()));
            }
        }
        Ok(files)
    }
}

/// Puts tokens into the lists of added and of special tokens that are there.
fn list(fields: &mut Map<String, Value>, ids: &[u32], added: &[AddedToken]) {
    if let Some(Value::Object(decoder)) = fields.get_mut("added_tokens_decoder") {
        decoder.extend(
            ids.iter()
                .zip(added)
                .map(|(id, token)| (id.to_string(), json!(token))),
        );
    }
    for name in SPECIAL_LISTS {
        if let Some(Value::Array(special)) = fields.get_mut(name) {
            let new = added.iter().filter(|token| token.special);
            special.extend(new.map(|token| json!(token.content)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A tokenizer of each model kind, over the same few words.
    fn tokenizer(model: &str, normalizer: &Value) -> Value {
        let words = ["[UNK]", "a", "b", "ab", "the"];
        let vocab: Map<String, Value> = (0..)
            .zip(words)
            .map(|(id, word)| (word.to_owned(), json!(id)))
            .collect();
        let model = match model {
            "WordPiece" => {
                json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab})
            }
            "Unigram" => json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                "vocab": words.map(|word| json!([word, -1.0]))}),
            _ => {
                json!({"type": "BPE", "dropout": null, "unk_token": "[UNK]", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [["a", "b"]]})
            }
        };
        let old = json!({"id": 5, "content": "<old>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        json!({"version": "1.0", "truncation": null,
            "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "[UNK]"},
            "added_tokens": [old], "normalizer": normalizer, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null, "model": model})
    }

    fn written(dir: &Path, model: &str, normalizer: &Value) -> Vocabulary {
        fs::write(
            dir.join("tokenizer.json"),
            tokenizer(model, normalizer).to_string(),
        )
        .unwrap();
        Vocabulary::of_model(dir)
    }

    fn of(kind: TokenKind) -> TokenFlags {
        TokenFlags {
            kind,
            ..TokenFlags::default()
        }
    }

    fn strings(tokens: &[&str]) -> Vec<String> {
        tokens.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn tokens_are_added_to_every_kind_of_model() {
        for model in ["BPE", "WordPiece", "Unigram"] {
            for kind in [TokenKind::Special, TokenKind::Normal] {
                let home = tempfile::tempdir().unwrap();
                let before = written(home.path(), model, &json!({"type": "Lowercase"}));
                let added = before.add(&strings(&["<X>", "new word"]), of(kind)).unwrap();
                assert_eq!(added.ids, [6, 7], "{model}");
                let [(name, bytes)] = &added.files[..] else {
                    panic!("{:?}", added.files)
                };
                fs::write(home.path().join(name), bytes).unwrap();
                let after = Vocabulary::of_model(home.path());
                assert_eq!(after.encode("a<X> ab").unwrap(), [1, 6, 3], "{model}");
                assert!(after.encode("ab new word b").unwrap().contains(&7), "{model}");
                assert_eq!(after.single_id("<X>").unwrap(), 6);
                assert_eq!(after.missed_contexts(7).unwrap(), []);
                // A special token is found as it is written, a normal one after the text was normalized.
                assert_eq!(
                    after.encode("<x>").unwrap() == [6],
                    kind == TokenKind::Normal,
                    "{model}"
                );
                // All else is as it was, the padding among it.
                let file: Value = serde_json::from_slice(bytes).unwrap();
                let old = tokenizer(model, &json!({"type": "Lowercase"}));
                for field in ["model", "normalizer", "pre_tokenizer", "padding"] {
                    assert_eq!(file[field], old[field], "{model}: {field}");
                }
                assert_eq!(file["added_tokens"][0], old["added_tokens"][0]);
                assert_eq!(file["added_tokens"].as_array().unwrap().len(), 3);
            }
        }
    }

    #[test]
    fn flags_say_where_a_token_is_found() {
        let home = tempfile::tempdir().unwrap();
        let vocabulary = written(home.path(), "BPE", &Value::Null);
        let encoded = |flags: TokenFlags, text: &str| {
            let added = vocabulary.add(&strings(&["<n>"]), flags).unwrap();
            assert_eq!(added.vocabulary.missed_contexts(6).unwrap(), [], "{flags:?}");
            added.vocabulary.encode(text).unwrap()
        };
        let single = TokenFlags {
            single_word: true,
            ..TokenFlags::default()
        };
        assert_eq!(encoded(TokenFlags::default(), "a<n>b"), [1, 6, 2]);
        assert!(!encoded(single, "a<n>b").contains(&6));
        assert_eq!(encoded(single, "a <n> b"), [1, 6, 2]);
        // The spaces belong to the token, so that no other token stands for them.
        for (lstrip, rstrip) in [(true, false), (false, true), (true, true)] {
            let flags = TokenFlags {
                lstrip,
                rstrip,
                ..TokenFlags::default()
            };
            let added = vocabulary.add(&strings(&["<n>"]), flags).unwrap();
            let file: Value = serde_json::from_slice(&added.files[0].1).unwrap();
            let entry = &file["added_tokens"][1];
            assert_eq!([&entry["lstrip"], &entry["rstrip"]], [lstrip, rstrip]);
            assert_eq!(encoded(flags, "a <n> b"), [1, 6, 2]);
        }
    }

    #[test]
    fn lists_that_are_there_get_the_tokens() {
        let home = tempfile::tempdir().unwrap();
        let vocabulary = written(home.path(), "BPE", &Value::Null);
        let write = |name: &str, value: &Value| fs::write(home.path().join(name), value.to_string()).unwrap();
        write(
            "tokenizer_config.json",
            &json!({"added_tokens_decoder": {"5": {"content": "<old>"}}, "extra_special_tokens": {"x": "<old>"}}),
        );
        write(
            "special_tokens_map.json",
            &json!({"additional_special_tokens": ["<old>"], "unk_token": "[UNK]"}),
        );
        write("added_tokens.json", &json!({"<old>": 5}));
        let files = |kind| {
            let files = vocabulary.add(&strings(&["<n>"]), of(kind)).unwrap().files;
            files
                .into_iter()
                .map(|(name, bytes)| (name, serde_json::from_slice(&bytes).unwrap()))
                .collect::<Vec<(PathBuf, Value)>>()
        };
        let special = files(TokenKind::Special);
        assert_eq!(special.len(), 4);
        let entry = |special: bool| {
            json!({"content": "<n>", "lstrip": false, "normalized": !special, "rstrip": false, "single_word": false,
            "special": special})
        };
        assert_eq!(special[1].1["added_tokens_decoder"]["6"], entry(true));
        assert_eq!(special[1].1["extra_special_tokens"], json!({"x": "<old>"}));
        assert_eq!(special[2].1["additional_special_tokens"], json!(["<old>", "<n>"]));
        assert_eq!(special[3].1, json!({"<old>": 5, "<n>": 6}));
        let normal = files(TokenKind::Normal);
        assert_eq!(normal[1].1["added_tokens_decoder"]["6"], entry(false));
        assert_eq!(normal.len(), 3, "a normal token is no special one");
    }

    #[test]
    fn what_is_no_new_token_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let vocabulary = written(home.path(), "WordPiece", &json!({"type": "Lowercase"}));
        for (tokens, kind, parts) in [
            (&["<n>", "the"][..], TokenKind::Special, ["'the'", "id 4"]),
            (&["<old>"], TokenKind::Special, ["'<old>'", "id 5"]),
            (&["<n>", "<n>"], TokenKind::Special, ["'<n>'", "twice"]),
            (&[""], TokenKind::Special, ["''", "empty"]),
            // Found after the text was normalized, it would be found in place of the word.
            (&["THE"], TokenKind::Normal, ["'THE'", "'the'"]),
        ] {
            let error = vocabulary
                .add(&strings(tokens), of(kind))
                .unwrap_err()
                .to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert_eq!(
            vocabulary
                .add(&strings(&["THE"]), TokenFlags::default())
                .unwrap()
                .ids,
            [6]
        );
        // An id that the model has given away already.
        let mut gaps = tokenizer("BPE", &Value::Null);
        gaps["model"]["vocab"]["far"] = json!(6);
        gaps["added_tokens"] = json!([]);
        fs::write(home.path().join("tokenizer.json"), gaps.to_string()).unwrap();
        let error = Vocabulary::of_model(home.path()).add(&strings(&["<n>"]), TokenFlags::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("'far'") && error.contains("gaps"), "{error}");
    }
}

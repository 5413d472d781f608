//! JSON with the strictness and the spelling that the files need.
//!
//! Numbers keep their text, a key given twice is an error, and [`Json::to_python`] writes what Python's
//! `json.dumps(…, indent=2, sort_keys=True)` writes.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Read as _;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Error, Result, one_line};

/// The largest config that is read: enough for the ids of every token of the largest vocabularies, and with
/// [`MAX_CONTAINERS`] little enough that a hostile file takes less than 200 MB.
pub(crate) const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Deepest nesting of a value; more is no config.
const MAX_DEPTH: usize = 64;
/// Most lists and objects of a value: each costs many times the bytes that it takes in the file.
const MAX_CONTAINERS: usize = 1 << 16;
/// Most keys of an object: enough for the tensors of the largest models.
const MAX_KEYS: usize = 1 << 18;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    /// The number as it was written.
    Number(String),
    String(String),
    Array(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    /// Parses a text. The error is one line.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let raw: &RawValue = serde_json::from_str(text).map_err(one_line)?;
        Self::from_raw(raw, 0, &mut 0)
    }

    fn from_raw(raw: &RawValue, depth: usize, containers: &mut usize) -> Result<Self, String> {
        if depth > MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        let text = raw.get();
        if text.starts_with(['{', '[']) {
            *containers += 1;
            if *containers > MAX_CONTAINERS {
                return Err(format!("more than {MAX_CONTAINERS} lists and objects"));
            }
        }
        Ok(match text.as_bytes().first() {
            Some(b'{') => {
                let UniqueMap(fields) =
                    serde_json::from_str::<UniqueMap<&RawValue>>(text).map_err(one_line)?;
                let fields = fields
                    .into_iter()
                    .map(|(key, value)| Ok((key, Self::from_raw(value, depth + 1, containers)?)));
                Self::Object(fields.collect::<Result<_, String>>()?)
            }
            Some(b'[') => {
                let items: Vec<&RawValue> = serde_json::from_str(text).map_err(one_line)?;
                let items = items
                    .into_iter()
                    .map(|item| Self::from_raw(item, depth + 1, containers));
                Self::Array(items.collect::<Result<_, String>>()?)
            }
            Some(b'"') => Self::String(serde_json::from_str(text).map_err(one_line)?),
            Some(b'n') => Self::Null,
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            _ => Self::Number(text.to_owned()),
        })
    }

    /// The value in the type that callers know.
    pub(crate) fn to_value(&self) -> serde_json::Value {
        serde_json::from_str(&self.to_python()).unwrap_or_default()
    }

    /// The value on one line, shortened if it is long; for messages.
    pub(crate) fn brief(&self) -> String {
        const LONGEST: usize = 60;
        let text = match self {
            Self::Number(text) => text.clone(),
            // JSON escapes fewer control characters than a line has to be free of.
            other => one_line(other.to_value()),
        };
        match text.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }

    /// What Python's `json.dumps(…, indent=2, sort_keys=True)` writes.
    pub(crate) fn to_python(&self) -> String {
        let mut out = String::new();
        self.write_python(&mut out, 0);
        out
    }

    fn write_python(&self, out: &mut String, depth: usize) {
        let newline = |out: &mut String, depth: usize| {
            out.push('\n');
            out.extend(std::iter::repeat_n("  ", depth));
        };
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Number(text) => out.push_str(text),
            Self::String(text) => write_python_string(text, out),
            Self::Array(items) if items.is_empty() => out.push_str("[]"),
            Self::Array(items) => {
                for (at, item) in items.iter().enumerate() {
                    out.push(if at == 0 { '[' } else { ',' });
                    newline(out, depth + 1);
                    item.write_python(out, depth + 1);
                }
                newline(out, depth);
                out.push(']');
            }
            Self::Object(fields) if fields.is_empty() => out.push_str("{}"),
            Self::Object(fields) => {
                for (at, (key, value)) in fields.iter().enumerate() {
                    out.push(if at == 0 { '{' } else { ',' });
                    newline(out, depth + 1);
                    write_python_string(key, out);
                    out.push_str(": ");
                    value.write_python(out, depth + 1);
                }
                newline(out, depth);
                out.push('}');
            }
        }
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// Python escapes everything that is not printable ASCII.
fn write_python_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                let _ = write!(out, "\\u{unit:04x}");
            }),
        }
    }
    out.push('"');
}

/// A JSON object in which no key occurs twice.
pub(crate) struct UniqueMap<V>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Unique<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some(key) = access.next_key::<String>()? {
                    if map.len() == MAX_KEYS {
                        return Err(A::Error::custom(format_args!("more than {MAX_KEYS} keys")));
                    }
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("key {key:?} occurs twice")));
                    }
                    let value = access.next_value()?;
                    map.insert(key, value);
                }
                Ok(UniqueMap(map))
            }
        }

        deserializer.deserialize_map(Unique(PhantomData))
    }
}

/// Reads a JSON file of at most `limit` bytes as text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    text_of(read_bytes(path, limit)?, path, limit)
}

/// Reads a file, but no more of it than tells that it is larger than `limit`.
pub(crate) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// The text of a JSON file's bytes.
pub(crate) fn text_of(bytes: Vec<u8>, path: &Path, limit: u64) -> Result<String> {
    let json = |reason: String| Error::Json {
        path: path.to_owned(),
        reason,
    };
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge {
            path: path.to_owned(),
            what: "a JSON file",
            bytes: bytes.len() as u64,
            limit,
        });
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(json(
            "it starts with a UTF-8 byte order mark; save it without one".into(),
        ));
    }
    String::from_utf8(bytes).map_err(|error| json(error.utf8_error().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_spelling_is_kept() {
        let text = "{\n  \"a\": [],\n  \"b\": {},\n  \"c\": [\n    1e-05,\n    123456789012345678901234567890,\n    \
                    \"\\u00e9\\ud83d\\ude00\\u007f\\n\\\"\\\\\"\n  ],\n  \"d\": {\n    \"x\": -0.0\n  }\n}";
        assert_eq!(Json::parse(text).unwrap().to_python(), text);
    }

    #[test]
    fn keys_are_counted() {
        let object = |count: usize| {
            let keys: Vec<_> = (0..count).map(|at| format!("\"{at}\":0")).collect();
            Json::parse(&format!("{{{}}}", keys.join(",")))
        };
        assert!(object(MAX_KEYS).is_ok());
        assert!(object(MAX_KEYS + 1).unwrap_err().contains("262144 keys"));
    }

    #[test]
    fn messages_stay_on_one_line() {
        let text = Json::parse("\"a\u{7f}\u{9b}\\nb\"").unwrap().brief();
        assert_eq!(text, r#""a\u{7f}\u{9b}\nb""#);
    }

    #[test]
    fn repeated_keys_are_refused_at_any_depth() {
        assert!(
            Json::parse(r#"{"a":1,"a":1}"#)
                .unwrap_err()
                .contains("\"a\" occurs twice")
        );
        assert!(Json::parse(r#"[{"b":{"\u0061":1,"a":2}}]"#).is_err());
        assert!(Json::parse("NaN").is_err());
        assert!(Json::parse(&"[".repeat(100_000)).is_err());
        assert!(Json::parse(&format!("{}{}", "[".repeat(100), "]".repeat(100))).is_err());
    }
}

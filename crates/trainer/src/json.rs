//! JSON objects, with messages for people.

use serde::de::DeserializeOwned;

/// Parses a JSON object. Serde would take an array for a struct, too, and that is never meant.
pub(crate) fn parse_object<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    if text.trim_ascii_start().first() != Some(&b'{') {
        return Err("it is not a JSON object".to_owned());
    }
    let reason = |error: serde_json::Error| error.to_string().replace(" at line 1 column ", " at column ");
    serde_json::from_slice(text).map_err(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_objects_are_structs() {
        #[derive(Debug, serde::Deserialize)]
        struct Pair {
            a: u32,
        }
        assert_eq!(parse_object::<Pair>(b" {\"a\": 3}\n").unwrap().a, 3);
        for text in ["[3]", "", " ", "3", "null", "\"a\""] {
            let reason = parse_object::<Pair>(text.as_bytes()).unwrap_err();
            assert_eq!(reason, "it is not a JSON object", "{text}");
        }
        let reason = parse_object::<Pair>(b"{\"a\": true}").unwrap_err();
        assert!(reason.ends_with("expected u32 at column 10"), "{reason}");
    }
}

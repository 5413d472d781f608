//! The names of trained rows in a file.

const PREFIX: &str = "base_model.model.";
const DELTA: &str = ".trainable_tokens_delta";
const LORA_WRAPPER: &str = ".token_adapter";

/// What the name of a tensor says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// The rows of the module at this path.
    Rows(&'a str),
    /// Almost rows: PEFT would look for this name instead.
    Misnamed(String),
    /// Some other tensor.
    Other,
}

/// The name of the rows of the module at `path`.
pub(super) fn key_of(path: &str) -> String {
    format!("{PREFIX}{path}{DELTA}")
}

pub(super) fn parse(name: &str) -> Key<'_> {
    // The last place where the name of rows ends, or goes on after another dot.
    let found = name
        .rmatch_indices(DELTA)
        .map(|(at, _)| (&name[..at], &name[at + DELTA.len()..]))
        .find(|(_, tail)| tail.is_empty() || tail.starts_with('.'));
    let Some((head, tail)) = found else {
        return match name.strip_prefix(&DELTA[1..]) {
            Some("") => Key::Misnamed(key_of("<module>")),
            _ => Key::Other,
        };
    };
    let path = head.strip_prefix(PREFIX);
    match path {
        Some(path) if tail.is_empty() && !path.ends_with(LORA_WRAPPER) && !path.is_empty() => Key::Rows(path),
        _ => {
            let path = path.unwrap_or(head);
            let path = path.strip_suffix(LORA_WRAPPER).unwrap_or(path);
            let nameless = path.is_empty() || PREFIX.strip_suffix('.') == Some(path);
            Key::Misnamed(key_of(if nameless { "<module>" } else { path }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_name_is_rows() {
        let rows = "base_model.model.model.embed_tokens.trainable_tokens_delta";
        assert_eq!(parse(rows), Key::Rows("model.embed_tokens"));
        assert_eq!(key_of("model.embed_tokens"), rows);
        for misnamed in [
            "model.embed_tokens.trainable_tokens_delta",
            "base_model.model.model.embed_tokens.trainable_tokens_delta.default",
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        ] {
            assert_eq!(parse(misnamed), Key::Misnamed(rows.to_owned()));
        }
        for nameless in [
            "trainable_tokens_delta",
            "base_model.model.trainable_tokens_delta",
        ] {
            assert_eq!(parse(nameless), Key::Misnamed(key_of("<module>")));
        }
        let twice = "a.trainable_tokens_delta.trainable_tokens_deltas";
        assert_eq!(parse(twice), Key::Misnamed(key_of("a")));
        for other in [
            "base_model.model.lm_head.base_layer.weight",
            "x",
            "",
            "a.trainable_tokens_deltas",
        ] {
            assert_eq!(parse(other), Key::Other);
        }
    }
}

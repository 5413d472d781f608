//! The names of trained rows in a file.

use crate::config::PeftType;

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
pub(super) fn key_of(kind: PeftType, path: &str) -> String {
    format!("{PREFIX}{path}{}{DELTA}", wrapper(kind))
}

/// The name in the model of what has this name in a file.
pub(super) fn name_in_model(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)
}

/// What stands between a module's path and the name of its rows.
fn wrapper(kind: PeftType) -> &'static str {
    match kind {
        PeftType::TrainableTokens => "",
        PeftType::Lora => LORA_WRAPPER,
    }
}

/// Where PEFT keeps the whole table of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// Under the rows that replace some of its own.
    UnderRows,
    /// A module without rows.
    Plain,
}

/// The name of the whole table of the module at `path`, which PEFT writes with `save_embedding_layers`.
pub(super) fn layer_key(kind: PeftType, path: &str, layer: Layer) -> String {
    match layer {
        Layer::UnderRows => format!("{PREFIX}{path}{}.base_layer.weight", wrapper(kind)),
        Layer::Plain => format!("{PREFIX}{path}.weight"),
    }
}

/// The path of the module whose whole table has this name, if it has no rows.
pub(super) fn plain_layer(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)?.strip_suffix(".weight")
}

pub(super) fn parse(kind: PeftType, name: &str) -> Key<'_> {
    // The last place where the name of rows ends, or goes on after another dot.
    let found = name
        .rmatch_indices(DELTA)
        .map(|(at, _)| (&name[..at], &name[at + DELTA.len()..]))
        .find(|(_, tail)| tail.is_empty() || tail.starts_with('.'));
    let Some((head, _)) = found else {
        return match name.strip_prefix(&DELTA[1..]) {
            Some("") => Key::Misnamed(key_of(kind, "<module>")),
            _ => Key::Other,
        };
    };
    let inner = head.strip_prefix(PREFIX);
    let path = inner
        .unwrap_or(head)
        .strip_suffix(LORA_WRAPPER)
        .unwrap_or(inner.unwrap_or(head));
    let nameless = [PREFIX, LORA_WRAPPER]
        .map(|part| part.trim_matches('.'))
        .contains(&path);
    let path = if nameless || path.is_empty() {
        "<module>"
    } else {
        path
    };
    let expected = key_of(kind, path);
    match inner.and_then(|inner| inner.strip_suffix(wrapper(kind))) {
        Some(path) if name == expected => Key::Rows(path),
        _ => Key::Misnamed(expected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: &str = "base_model.model.model.embed_tokens.trainable_tokens_delta";
    const WRAPPED: &str = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";

    #[test]
    fn only_the_exact_name_is_rows() {
        for (kind, rows, other) in [
            (PeftType::TrainableTokens, BARE, WRAPPED),
            (PeftType::Lora, WRAPPED, BARE),
        ] {
            assert_eq!(parse(kind, rows), Key::Rows("model.embed_tokens"));
            assert_eq!(key_of(kind, "model.embed_tokens"), rows);
            for misnamed in [
                other,
                "model.embed_tokens.trainable_tokens_delta",
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
                "base_model.model.model.embed_tokens.trainable_tokens_delta.default",
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
            ] {
                assert_eq!(parse(kind, misnamed), Key::Misnamed(rows.to_owned()));
            }
            for nameless in [
                "trainable_tokens_delta",
                "base_model.model.trainable_tokens_delta",
                "base_model.model.token_adapter.trainable_tokens_delta",
            ] {
                assert_eq!(parse(kind, nameless), Key::Misnamed(key_of(kind, "<module>")));
            }
            let twice = "a.trainable_tokens_delta.trainable_tokens_deltas";
            assert_eq!(parse(kind, twice), Key::Misnamed(key_of(kind, "a")));
            for other in [
                "base_model.model.lm_head.base_layer.weight",
                "x",
                "",
                "a.trainable_tokens_deltas",
            ] {
                assert_eq!(parse(kind, other), Key::Other);
            }
        }
    }
}

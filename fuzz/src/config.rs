//! `adapter_config.json`.

use trainable_tokens_core::{TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, AdapterConfig};

use crate::check_message;

const PATH: &str = "adapter_config.json";

/// The input is a config; after a last NUL follows the path of a module.
///
/// What is read is written and read again to the same text and fields; the module is targeted, or not, or the pattern
/// is refused, in bounded time.
pub fn config(input: &[u8]) {
    let (json, module) = match input.iter().rposition(|byte| *byte == 0) {
        Some(at) => (&input[..at], &input[at + 1..]),
        None => (input, &b"model.embed_tokens"[..]),
    };
    let config = match AdapterConfig::from_json(json, PATH) {
        Ok(config) => config,
        Err(error) => return check_message(&error.to_string()),
    };
    check_round_trip(&config);
    if let Ok(module) = std::str::from_utf8(module) {
        check_target(&config, module);
    }
}

/// Text and fields come back.
pub(crate) fn check_round_trip(config: &AdapterConfig) {
    let text = config.to_json();
    let again = AdapterConfig::from_json(text.as_bytes(), PATH).expect("what was written is read");
    assert_eq!(*config, again);
    assert_eq!(text, again.to_json());
    for (name, value) in [
        ("peft_version", config.peft_version()),
        ("revision", config.revision()),
        ("base_model_name_or_path", config.base_model_name_or_path()),
    ] {
        let field = config.field(name).unwrap_or_default();
        assert_eq!(field.as_str(), value);
    }
}

/// Builds an adapter for a module that may not be targeted.
fn check_target(config: &AdapterConfig, module: &str) {
    let tokens = TokenSet::new([0], 1).expect("one token");
    let rows = TokenRows::new(vec![0.0f32], 1, 1).expect("one number");
    let adapter = Adapter::builder(module, &tokens, rows)
        .target_modules(config.target_modules().clone())
        .build();
    match adapter {
        Ok(adapter) => assert_eq!(adapter.config().target_modules(), config.target_modules()),
        Err(error) => check_message(&error.to_string()),
    }
}

//! `adapter_config.json`.

use trainable_tokens_format::{Adapter, AdapterConfig, PeftType, SafetensorsFile};

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
        check_target(config, module);
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

/// Reads an adapter with rows for a module that may not be targeted.
fn check_target(config: AdapterConfig, module: &str) {
    let Some(ids) = config.token_indices().common().filter(|ids| ids.len() < 64) else {
        return;
    };
    let (rows, bytes) = (ids.len(), ids.len() * 2);
    let tensor = serde_json::json!({"dtype": "F16", "shape": [rows, 1], "data_offsets": [0, bytes]});
    let name = match config.peft_type() {
        PeftType::Lora => format!("base_model.model.{module}.token_adapter.trainable_tokens_delta"),
        PeftType::TrainableTokens => format!("base_model.model.{module}.trainable_tokens_delta"),
    };
    let header = serde_json::json!({name: tensor}).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length[..], header.as_bytes(), &vec![0; bytes]].concat();
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", file).expect("the file is sound");
    match Adapter::from_parts(config, &file) {
        Ok(adapter) => assert!(adapter.modules().len() <= 1),
        Err(error) => check_message(&error.to_string()),
    }
}

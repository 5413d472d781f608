//! The fields that PEFT writes for a new config.

use std::collections::BTreeMap;

use super::PeftType;
use crate::json::Json;

/// The release of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// Fields of a `LoraConfig` whose default is `null`.
const LORA_NULLS: [&str; 17] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
];

/// Every field, with the value that PEFT's class gives it. Adapters are saved for inference.
pub(super) fn fields(kind: PeftType) -> BTreeMap<String, Json> {
    let common = [
        ("auto_mapping", Json::Null),
        ("base_model_name_or_path", Json::Null),
        ("inference_mode", Json::Bool(true)),
        ("peft_type", kind.as_str().into()),
        ("peft_version", PEFT_VERSION.into()),
        ("revision", Json::Null),
        ("target_modules", Json::Null),
        ("task_type", Json::Null),
    ];
    let own = match kind {
        PeftType::TrainableTokens => vec![
            ("init_weights", Json::Bool(true)),
            ("token_indices", Json::Array(Vec::new())),
        ],
        PeftType::Lora => lora(),
    };
    let fields = common.into_iter().chain(own);
    fields.map(|(name, value)| (name.to_owned(), value)).collect()
}

fn lora() -> Vec<(&'static str, Json)> {
    let empty = || Json::Object(BTreeMap::new());
    let number = |text: &str| Json::Number(text.to_owned());
    let mut fields = vec![
        ("alpha_pattern", empty()),
        ("bias", "none".into()),
        ("init_lora_weights", Json::Bool(true)),
        ("loftq_config", empty()),
        ("lora_alpha", number("8")),
        ("lora_dropout", number("0.0")),
        ("megatron_core", "megatron.core".into()),
        ("qalora_group_size", number("16")),
        ("r", number("8")),
        ("rank_pattern", empty()),
    ];
    let off = [
        "ensure_weight_tying",
        "fan_in_fan_out",
        "lora_bias",
        "use_dora",
        "use_qalora",
        "use_rslora",
    ];
    fields.extend(off.map(|name| (name, Json::Bool(false))));
    fields.extend(LORA_NULLS.map(|name| (name, Json::Null)));
    fields
}

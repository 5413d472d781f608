//! Every malformed adapter of the fixtures is refused, or read on purpose.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::fixtures;
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint};

/// What becomes of the cases that a strict reader may take either way.
const EITHER: [(&str, Outcome, &str); 15] = [
    (
        "bad_task_type",
        Outcome::Refused,
        "a task PEFT does not know; PEFT refuses too",
    ),
    ("config_bom", Outcome::Refused, "not JSON; PEFT refuses too"),
    (
        "config_duplicate_keys",
        Outcome::Refused,
        "which of two token_indices counts is a guess",
    ),
    ("config_nan_literal", Outcome::Refused, "not JSON"),
    ("dtype_f8", Outcome::Refused, "F8 rows are not trained rows"),
    (
        "duplicate_header_key",
        Outcome::Refused,
        "which of two tensors counts is a guess",
    ),
    ("extra_key", Outcome::Read, "kept, and written again"),
    (
        "index_integral_float",
        Outcome::Refused,
        "PEFT loads it, but its forward fails",
    ),
    ("inf_value", Outcome::Read, "first_non_finite() tells"),
    (
        "key_with_adapter_name",
        Outcome::Refused,
        "the error names the key expected",
    ),
    (
        "key_without_prefix",
        Outcome::Refused,
        "PEFT leaves the base rows in place",
    ),
    (
        "metadata_not_strings",
        Outcome::Refused,
        "not safetensors; PEFT refuses too",
    ),
    ("nan_value", Outcome::Read, "first_non_finite() tells"),
    ("pickle_only", Outcome::Refused, "pickles run code"),
    ("target_null", Outcome::Read, "the only stored module is meant"),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Read,
    Refused,
}

/// Reads a case and checks it against the base of all of them.
fn outcome(case: &str, base: &Checkpoint) -> Result<(), String> {
    let dir = fixtures().join("malformed").join(case).join("adapter");
    let adapter = Adapter::read(dir).map_err(|error| error.to_string())?;
    adapter
        .check_against(base, BaseCheck::SameTable)
        .map_err(|error| error.to_string())
}

fn expected(case: &str) -> Outcome {
    let text = fs::read(fixtures().join("malformed").join(case).join("case.json")).unwrap();
    let description: serde_json::Value = serde_json::from_slice(&text).unwrap();
    match description["kind"].as_str() {
        Some("accept") => Outcome::Read,
        Some("error") => Outcome::Refused,
        kind => {
            assert_eq!(kind, Some("either"), "{case}");
            let (.., outcome, _) = EITHER.iter().find(|(name, ..)| *name == case).unwrap();
            *outcome
        }
    }
}

#[test]
fn every_case_has_the_outcome_decided_for_it() {
    let base = Checkpoint::open(fixtures().join("malformed/_base/base")).unwrap();
    let mut cases = 0;
    let mut wrong = Vec::new();
    for entry in fs::read_dir(fixtures().join("malformed")).unwrap() {
        let case = entry.unwrap().file_name().into_string().unwrap();
        if case == "_base" {
            continue;
        }
        cases += 1;
        let result = outcome(&case, &base);
        println!("{case}: {result:?}");
        let got = if result.is_ok() {
            Outcome::Read
        } else {
            Outcome::Refused
        };
        if got != expected(&case) {
            wrong.push(format!("{case}: {result:?}"));
        }
        if let Err(message) = result {
            assert!(!message.contains(['\n', '\r']), "{case}: {message}");
            assert!(!message.ends_with('.'), "{case}: {message}");
        }
    }
    assert_eq!(cases, 82);
    assert!(wrong.is_empty(), "{wrong:#?}");
    outcome("_base", &base).unwrap();
}

#[test]
fn messages_name_the_culprit() {
    let base = Checkpoint::open(fixtures().join("malformed/_base/base")).unwrap();
    for (case, parts) in [
        (
            "index_bool",
            &["adapter_config.json", "token_indices[0]", "true"][..],
        ),
        ("index_negative", &["token_indices[", "-1"]),
        ("index_integral_float", &["token_indices[0]", "20.0"]),
        ("index_duplicate", &["token_indices[", "already stands at index"]),
        ("index_out_of_range", &["token_indices[", "21"]),
        ("index_above_i64", &["18446744073709551616"]),
        ("missing_token_indices", &["token_indices", "missing"]),
        (
            "lora_peft_type",
            &["base_model.model.emb.token_adapter.trainable_tokens_delta"],
        ),
        (
            "lowercase_peft_type",
            &["\"trainable_tokens\"", "TRAINABLE_TOKENS"],
        ),
        ("bad_task_type", &["SING_A_SONG", "SEQ_CLS", "FEATURE_EXTRACTION"]),
        (
            "dtype_i64",
            &["base_model.model.emb.trainable_tokens_delta", "I64"],
        ),
        ("transposed", &["[6, 3]", "[3, D]"]),
        ("wrong_dim", &["\"emb\"", "5", "6"]),
        (
            "key_without_prefix",
            &["base_model.model.emb.trainable_tokens_delta"],
        ),
        ("config_bom", &["byte order mark"]),
        ("config_duplicate_keys", &["\"token_indices\" occurs twice"]),
        ("target_missing", &["no_such_module", "emb"]),
        ("target_bad_regex", &["target_modules", "(emb"]),
        ("header_length_bomb", &["adapter_model.safetensors", "header"]),
        ("pickle_only", &["adapter_model.bin", "convert"]),
        ("weights_missing", &["adapter_model.safetensors does not exist"]),
    ] {
        let message = outcome(case, &base).unwrap_err();
        for part in parts {
            assert!(message.contains(part), "{case}: {part:?} is not in: {message}");
        }
    }
}

//! `adapter_config.json`.

use serde_json::{Value, json};
use trainable_tokens_core::{ErrorKind, TokenRows};
use trainable_tokens_format::{Adapter, AdapterConfig, TargetModules, TaskType, TokenIndices};

use super::{HEAD, MODULE, adapter_of};
use crate::failure::{ensure, equal, refused};
use crate::world::{World, for_all};
use crate::{Failure, Harness, Outcome};

/// The text of a list as Python's `json.dumps` spells it at the first level.
fn listed(items: &[impl ToString]) -> String {
    if items.is_empty() {
        return "[]".to_owned();
    }
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    format!("[\n    {}\n  ]", items.join(",\n    "))
}

/// The config of a new adapter has these fields, spelled in this way, and the ids in slot order.
pub fn a_new_config_is_spelled_as_peft_does<H: Harness>() -> Outcome {
    let text = |base: &str, init: bool, target: &str, task: &str, ids: &[u32]| {
        format!(
            "{{\n  \"auto_mapping\": null,\n  \"base_model_name_or_path\": {base},\n  \"inference_mode\": true,\n  \
             \"init_weights\": {init},\n  \"peft_type\": \"TRAINABLE_TOKENS\",\n  \"peft_version\": \"0.21.2\",\n  \
             \"revision\": null,\n  \"target_modules\": {target},\n  \"task_type\": {task},\n  \
             \"token_indices\": {}\n}}",
            listed(ids)
        )
    };
    for_all(|world| {
        let config = adapter_of::<H>(&world.trained::<H>()?)?.config().to_json();
        let target = listed(&["\"embed_tokens\""]);
        let want = text("null", true, &target, "\"CAUSAL_LM\"", &world.tokens);
        equal("the config", &config, &want)?;
        let builder = Adapter::builder(MODULE, &world.token_set()?, world.rows::<H>());
        let config = builder
            .module(HEAD, world.rows::<H>())
            .module("other.embed_tokens", world.rows::<H>())
            .base_model_name_or_path("org/é")
            .init_weights(false)
            .task_type(None)
            .build()?
            .config()
            .to_json();
        let target = listed(&["\"embed_tokens\"", "\"lm_head\""]);
        let want = text("\"org/\\u00e9\"", false, &target, "null", &world.tokens);
        equal("a config with everything given", &config, &want)
    })
}

/// A config of these fields besides the required ones.
fn config(fields: &str) -> trainable_tokens_format::Result<AdapterConfig> {
    let text = format!(r#"{{"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 2]{fields}}}"#);
    parse(text)
}

fn parse(text: impl AsRef<[u8]>) -> trainable_tokens_format::Result<AdapterConfig> {
    AdapterConfig::from_json(text.as_ref(), "adapter_config.json")
}

/// Fields that are not known are written again, with the numbers as they were spelled, keys sorted at every depth and
/// strings escaped as Python does.
pub fn other_fields_are_kept_and_spelled_as_python_does<H: Harness>() -> Outcome {
    let read = config(
        ", \"é\":[ ],\"z\" :{},\"a\":{\"\u{ffff}\":-0.0,\"\u{10000}\":1e-05,\"b\":{\"d\":1E+2,\"c\":[[],\
         123456789012345678901234567890]}}, \"s\":\"\\\"\\\\\\/\\n\\r\\t\\b\\f\\u0001 ~\\u007f\u{80}é\u{ffff}\u{1F600}\"",
    )?;
    let want = [
        "{",
        "  \"a\": {",
        "    \"b\": {",
        "      \"c\": [",
        "        [],",
        "        123456789012345678901234567890",
        "      ],",
        "      \"d\": 1E+2",
        "    },",
        "    \"\\uffff\": -0.0,",
        "    \"\\ud800\\udc00\": 1e-05",
        "  },",
        "  \"peft_type\": \"TRAINABLE_TOKENS\",",
        "  \"s\": \"\\\"\\\\/\\n\\r\\t\\b\\f\\u0001 ~\\u007f\\u0080\\u00e9\\uffff\\ud83d\\ude00\",",
        "  \"token_indices\": [",
        "    5,",
        "    2",
        "  ],",
        "  \"z\": {},",
        "  \"\\u00e9\": []",
        "}",
    ];
    equal("the config", &read.to_json(), &want.join("\n"))?;
    equal("the config read again", &parse(read.to_json())?, &read)
}

/// Only one object of strict JSON is read: no byte order mark, repeated key, NaN, deep nesting, more than 4 MiB, or
/// more lists than any config has.
pub fn a_config_is_strict_json<H: Harness>() -> Outcome {
    let good = config("")?.to_json();
    let nested = |depth: usize| config(&format!(", \"x\": {}1{}", "[".repeat(depth), "]".repeat(depth)));
    let sized = |bytes: usize| parse(format!("{good}{}", " ".repeat(bytes - good.len())));
    nested(63)?;
    refused("a value 65 deep", nested(64), ErrorKind::File)?;
    sized(4 << 20)?;
    refused("more than 4 MiB", sized((4 << 20) + 1), ErrorKind::File)?;
    refused("a bomb", parse("[".repeat(1 << 20)), ErrorKind::File)?;
    let own = good.matches(['{', '[']).count();
    let lists = |count: usize| config(&format!(", \"x\": [{}[]]", "[],".repeat(count - own - 2)));
    lists(1 << 16)?;
    refused("more than 65536 lists", lists((1 << 16) + 1), ErrorKind::File)?;
    refused(
        "a byte order mark",
        parse(format!("\u{feff}{good}")),
        ErrorKind::File,
    )?;
    refused("no UTF-8", parse(b"{\"a\": \"\xff\"}"), ErrorKind::File)?;
    for text in [
        "",
        "[]",
        "null",
        "{",
        "{}}",
        "{'a': 1}",
        "{\"a\": 1,}",
        &good[1..],
    ] {
        refused(text, parse(text), ErrorKind::File)?;
    }
    for fields in [
        r#", "token_indices": [5, 2]"#,
        r#", "x": 1, "x": 1"#,
        r#", "x": [{"a": {"b": 1, "\u0062": 1}}]"#,
        r#", "x": NaN"#,
        r#", "x": [Infinity]"#,
        r#", "x": -Infinity"#,
        r#", "x": +1"#,
        r#", "x": 01"#,
    ] {
        refused(fields, config(fields), ErrorKind::File)?;
    }
    Ok(())
}

/// The fields that are known have their types, or are absent.
pub fn fields_have_their_types<H: Harness>() -> Outcome {
    let values = [
        "null",
        "true",
        "1",
        "1.5",
        "\"text\"",
        "[]",
        "[\"a\"]",
        "{}",
        "\"CAUSAL_LM\"",
    ];
    for (field, allowed) in [
        ("auto_mapping", &values[..]),
        ("base_model_name_or_path", &["null", "\"text\"", "\"CAUSAL_LM\""]),
        ("peft_version", &["null", "\"text\"", "\"CAUSAL_LM\""]),
        ("revision", &["null", "\"text\"", "\"CAUSAL_LM\""]),
        ("inference_mode", &["true"]),
        ("init_weights", &["true"]),
        ("task_type", &["null", "\"CAUSAL_LM\""]),
        (
            "target_modules",
            &["null", "\"text\"", "\"CAUSAL_LM\"", "[\"a\"]"],
        ),
    ] {
        for value in values {
            let what = format!("{field} of {value}");
            let read = config(&format!(", \"{field}\": {value}"));
            if allowed.contains(&value) {
                let want: Value = serde_json::from_str(value)?;
                equal(&what, &read?.field(field), &Some(want))?;
            } else {
                refused(&what, read, ErrorKind::File)?;
            }
        }
    }
    for task in [
        "SEQ_CLS",
        "SEQ_2_SEQ_LM",
        "CAUSAL_LM",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "FEATURE_EXTRACTION",
    ] {
        let read = config(&format!(", \"task_type\": \"{task}\""))?;
        equal("the task", &read.task_type().map(TaskType::as_str), &Some(task))?;
    }
    refused(
        "another task",
        config(r#", "task_type": "causal_lm""#),
        ErrorKind::File,
    )?;
    let bare = config("")?;
    equal("init_weights if absent", &bare.init_weights(), &true)?;
    equal(
        "target_modules if absent",
        bare.target_modules(),
        &TargetModules::Default,
    )?;
    equal("task_type if absent", &bare.task_type(), &None)?;
    for (name, text) in [
        ("token_indices", r#"{"peft_type": "TRAINABLE_TOKENS"}"#),
        ("peft_type", r#"{"token_indices": []}"#),
    ] {
        let read = parse(text);
        let message = read.as_ref().map_or_else(ToString::to_string, |_| String::new());
        refused(&format!("no {name}"), read, ErrorKind::File)?;
        ensure!(
            message.contains(name),
            "the error does not name {name}: {message}"
        );
    }
    Ok(())
}

/// `token_indices` are distinct integers of 32 bits, spelled as integers; the error names the first other one by its
/// index.
pub fn token_indices_are_distinct_integers<H: Harness>() -> Outcome {
    let read = |ids: &str| {
        parse(format!(
            r#"{{"peft_type": "TRAINABLE_TOKENS", "token_indices": {ids}}}"#
        ))
    };
    for ids in [&[][..], &[0], &[u32::MAX, 0, 7]] {
        equal(
            "token_indices",
            read(&json!(ids).to_string())?.token_indices(),
            &TokenIndices::List(ids.to_vec()),
        )?;
    }
    for bad in [
        "-1",
        "-0",
        "20.0",
        "2e1",
        "true",
        "null",
        "\"20\"",
        "[20]",
        "4294967296",
        "18446744073709551616",
        "7",
    ] {
        let result = read(&format!("[3, 7, {bad}, -1]"));
        let message = result
            .as_ref()
            .map_or_else(ToString::to_string, |_| String::new());
        refused(&format!("the id {bad}"), result, ErrorKind::File)?;
        ensure!(
            message.contains("token_indices[2]"),
            "the error does not name the index: {message}"
        );
    }
    for bad in ["null", "7", "\"7\"", "{}", "true"] {
        refused(&format!("token_indices of {bad}"), read(bad), ErrorKind::File)?;
    }
    Ok(())
}

/// Another `peft_type` is told apart from a broken config, with the kind `Unsupported`.
pub fn other_kinds_of_adapters_are_told_apart<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let rows = TokenRows::zeros(H::DTYPE, 2, 3);
    let files = super::Files::of(&super::plain_adapter(&world.tokens, rows)?)?;
    for kind in ["\"trainable_tokens\"", "\"PREFIX_TUNING\"", "\"\"", "null", "1"] {
        let text = files.config.replace("\"TRAINABLE_TOKENS\"", kind);
        ensure!(text != files.config, "the case is wrong");
        refused(kind, files.with_config(text).read()?, ErrorKind::Unsupported)?;
    }
    // Of the other kind that is known, the rows have another name.
    let lora =
        r#"{"peft_type": "LORA", "r": 8, "trainable_token_indices": [5, 2], "target_modules": ["q_proj"]}"#;
    refused("LoRA", files.with_config(lora).read()?, ErrorKind::File)?;
    files.read()?.map(drop).map_err(Failure::from)
}

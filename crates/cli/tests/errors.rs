//! Bad inputs: each is refused with status 1 and one line that names the culprit, and leaves nothing behind.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(unix)] // paths, links and file limits

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use support::{
    COMMANDS, Tensors, WITH_ADAPTER, WITH_CONFIG, WITH_DATA, WITH_DECODER, WITH_MODEL, WITH_OUTPUT,
    Workspace, args, copy_dir, edit_json, edit_tensors, fixture, read_json, run, run_with_file_limit,
};

const CONFIG: &str = "model/config.json";
const WEIGHTS: &str = "model/model.safetensors";
const INDEX: &str = "model/model.safetensors.index.json";
const TOKENIZER: &str = "model/tokenizer.json";
const ROWS: &str = "adapter/adapter_model.safetensors";
const TABLE: &str = "model.embed_tokens.weight";

/// Something that spoils a workspace.
type Spoil<'a> = &'a dyn Fn(&Workspace);

/// Spoils a workspace; then each of the commands must refuse, naming all of `parts`.
#[track_caller]
fn refuse(commands: &[&str], parts: &[&str], spoil: impl FnOnce(&Workspace)) {
    let workspace = Workspace::new();
    spoil(&workspace);
    for name in commands {
        workspace.refuses(&workspace.command(name), parts);
    }
}

/// The same, after a file was replaced.
#[track_caller]
fn refuse_file(commands: &[&str], parts: &[&str], file: &str, content: impl AsRef<[u8]>) {
    refuse(commands, parts, |workspace| {
        fs::write(workspace.path(file), content).unwrap();
    });
}

/// The value of an option, changed.
fn set(mut args: Vec<OsString>, option: &str, value: impl Into<OsString>) -> Vec<OsString> {
    let at = args.iter().position(|arg| arg == option).unwrap();
    args[at + 1] = value.into();
    args
}

fn remove(workspace: &Workspace, name: &str) {
    let path = workspace.path(name);
    if path.is_dir() {
        fs::remove_dir_all(path).unwrap();
    } else {
        fs::remove_file(path).unwrap();
    }
}

fn truncate(workspace: &Workspace, name: &str, length: usize) {
    let path = workspace.path(name);
    let bytes = fs::read(&path).unwrap();
    assert!(length < bytes.len());
    fs::write(path, &bytes[..length]).unwrap();
}

fn edit_config(edit: impl FnOnce(&mut Value)) -> impl FnOnce(&Workspace) {
    |workspace| edit_json(&workspace.path(CONFIG), edit)
}

fn edit_weights(edit: impl FnOnce(&mut Tensors)) -> impl FnOnce(&Workspace) {
    |workspace| edit_tensors(&workspace.path(WEIGHTS), edit)
}

#[test]
fn missing_models() {
    refuse(&WITH_MODEL, &["/model"], |workspace| remove(workspace, "model"));
    refuse(&["inspect file"], &["/model"], |workspace| {
        remove(workspace, "model");
    });
    refuse(&WITH_MODEL[..6], &["/model"], |workspace| {
        remove(workspace, "model");
        fs::write(workspace.model(), "a file").unwrap();
    });
    refuse(&WITH_CONFIG[..5], &["config.json does not exist"], |workspace| {
        remove(workspace, CONFIG);
    });
    refuse(&WITH_MODEL, &["model.safetensors"], |workspace| {
        remove(workspace, WEIGHTS);
    });
    refuse(&WITH_MODEL, &["/model", "pytorch_model.bin"], |workspace| {
        remove(workspace, WEIGHTS);
        fs::write(workspace.path("model/pytorch_model.bin"), "pickle").unwrap();
    });
    refuse(&["inspect model"], &["neither", "/model"], |workspace| {
        remove(workspace, CONFIG);
    });
}

#[test]
fn errors_leave_standard_output_empty_with_json_too() {
    let workspace = Workspace::new();
    fs::write(workspace.path(WEIGHTS), "").unwrap();
    for name in COMMANDS {
        workspace.refuses(&workspace.command_with(name, &["--json"]), &["model.safetensors"]);
    }
}

#[test]
fn malformed_configs() {
    let healthy = fs::read_to_string(fixture("llama_untied/base/config.json")).unwrap();
    let array = format!("[{healthy}]");
    // A list of values, in the order in which the fields happen to be declared, is no config either.
    let flat = r#"["llama", 300, 48, 80, 2, 4, 2, 12, 1e-6, "silu", null, null, null, 64, null, false, false, false, 3, 2]"#;
    for content in [
        "",
        "{",
        &healthy[..healthy.len() / 2],
        "null",
        "3",
        &array,
        flat,
        "{]",
    ] {
        refuse_file(&WITH_CONFIG, &["model/config.json"], CONFIG, content);
    }
    refuse_file(
        &WITH_CONFIG,
        &["model/config.json"],
        CONFIG,
        b"{\"model_type\": \"\xff\"}",
    );
    refuse_file(&WITH_CONFIG, &["model/config.json", "object"], CONFIG, "[]");
    for (field, value) in [
        ("vocab_size", json!(null)),
        ("vocab_size", json!("300")),
        ("vocab_size", json!(-300)),
        ("vocab_size", json!(300.5)),
        ("vocab_size", json!(0)),
        ("hidden_size", json!(null)),
        ("hidden_size", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("head_dim", json!(11)),
        ("num_hidden_layers", json!(null)),
        ("max_position_embeddings", json!("many")),
        ("pad_token_id", json!(300)),
        ("rope_parameters", json!({"rope_type": "longrope", "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "linear"})),
        ("hidden_act", json!("quick_gelu")),
        ("model_type", json!(null)),
        ("model_type", json!("gpt_neox")),
        ("tie_word_embeddings", json!("no")),
    ] {
        // A config without the field, where the value is null.
        let missing = value.is_null() && field != "model_type";
        let parts: &[&str] = match field {
            "model_type" => &["model/config.json", "model_type"],
            _ if missing => &["model/config.json", field, "missing"],
            _ => &["model/config.json"],
        };
        refuse(&WITH_CONFIG, parts, edit_config(|config| config[field] = value));
    }
    refuse(
        &WITH_DECODER,
        &["model/config.json", "gpt_neox", "llama"],
        edit_config(|config| {
            *config = json!({"model_type": "gpt_neox", "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2});
        }),
    );
}

#[test]
fn configs_that_contradict_the_weights() {
    for (field, value, tensor) in [
        ("vocab_size", 301, TABLE),
        ("hidden_size", 50, TABLE),
        ("intermediate_size", 79, "mlp"),
        ("num_hidden_layers", 3, "model.layers.2."),
        ("num_attention_heads", 2, "q_proj"),
        ("num_key_value_heads", 4, "k_proj"),
        ("head_dim", 24, "q_proj"),
    ] {
        let edit = edit_config(|config| config[field] = json!(value));
        refuse(&WITH_DECODER, &["/model", tensor], edit);
    }
    let edit = edit_config(|config| config["attention_bias"] = json!(true));
    refuse(&WITH_DECODER, &["self_attn.", ".bias"], edit);
    // Ids that the config has room for, and the table not.
    let workspace = Workspace::new();
    edit_json(&workspace.path(CONFIG), |config| {
        config["vocab_size"] = json!(400);
    });
    let args = set(workspace.command("init"), "--token-ids", "5,350");
    workspace.refuses(&args, &["350", "300"]);
}

#[test]
fn malformed_weights() {
    let length = fs::metadata(fixture("llama_untied/base/model.safetensors"))
        .unwrap()
        .len();
    let length = usize::try_from(length).unwrap();
    let commands = [&WITH_MODEL[..], &["inspect file"]].concat();
    for cut in [0, 4, 8, 9, 500, length / 2, length - 1] {
        refuse(&commands, &["model.safetensors"], |workspace| {
            truncate(workspace, WEIGHTS, cut);
        });
    }
    for content in [
        &b"not a safetensors file"[..],
        &[0xff; 64],
        &[0; 64],
        b"\x02\0\0\0\0\0\0\0[]",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    ] {
        refuse_file(&commands, &["model.safetensors"], WEIGHTS, content);
    }
    let mut longer = fs::read(fixture("llama_untied/base/model.safetensors")).unwrap();
    longer.push(0);
    refuse_file(&commands, &["model.safetensors"], WEIGHTS, longer);
    refuse(&WITH_MODEL, &["model.safetensors"], |workspace| {
        remove(workspace, WEIGHTS);
        fs::create_dir(workspace.path(WEIGHTS)).unwrap();
    });
}

#[test]
fn weights_that_are_missing_or_of_another_kind() {
    for tensor in [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ] {
        let without = edit_weights(|tensors| drop(tensors.remove(tensor).unwrap()));
        refuse(&WITH_DECODER, &["/model", tensor], without);
        let integers = edit_weights(|tensors| tensors.get_mut(tensor).unwrap().0 = Dtype::I32);
        refuse(&WITH_DECODER, &["model.safetensors", tensor, "I32"], integers);
    }
    // `inspect adapter` shows an adapter without drift, if the model has no such table; `verify` shows its findings.
    let others: Vec<_> = WITH_MODEL[..7]
        .iter()
        .copied()
        .filter(|name| *name != "verify")
        .collect();
    let without =
        |workspace: &Workspace| edit_table(workspace, |tensors| drop(tensors.remove(TABLE).unwrap()));
    let integers = |workspace: &Workspace| {
        edit_table(workspace, |tensors| {
            tensors.get_mut(TABLE).unwrap().0 = Dtype::I32;
        });
    };
    let flat = |workspace: &Workspace| {
        edit_table(workspace, |tensors| {
            tensors.get_mut(TABLE).unwrap().1 = vec![300 * 48];
        });
    };
    let spoilers: [(Spoil<'_>, &[&str]); 3] = [
        (&without, &["/model", TABLE]),
        (&integers, &["model.safetensors", TABLE, "I32"]),
        (&flat, &["/model", TABLE, "[14400]"]),
    ];
    for (spoil, parts) in spoilers {
        refuse(&others, parts, spoil);
        let workspace = Workspace::new();
        spoil(&workspace);
        let args = workspace.command_with("verify", &["--json"]);
        let run = run(&args);
        run.failed(parts);
        assert_eq!(run.json()["fits"], json!(false), "{run:#?}");
    }
}

/// Changes the tensors of the model.
fn edit_table(workspace: &Workspace, edit: impl FnOnce(&mut Tensors)) {
    edit_tensors(&workspace.path(WEIGHTS), edit);
}

/// Makes the model one of a single shard.
fn shard(workspace: &Workspace, edit: impl FnOnce(&mut Value)) {
    let shard = "model-00001-of-00001.safetensors";
    fs::rename(workspace.path(WEIGHTS), workspace.model().join(shard)).unwrap();
    let tensors = support::read_tensors(&workspace.model().join(shard));
    let map: serde_json::Map<String, Value> = tensors.into_keys().map(|name| (name, json!(shard))).collect();
    let mut index = json!({"metadata": {}, "weight_map": map});
    edit(&mut index);
    fs::write(workspace.path(INDEX), index.to_string()).unwrap();
}

#[test]
fn malformed_shards() {
    let workspace = Workspace::new();
    shard(&workspace, |_| {});
    for name in WITH_MODEL {
        run(&workspace.command_with(name, &["--force"])).ok();
        let out = workspace.out();
        if out.exists() {
            remove(&workspace, "out");
        }
    }
    let sharded = |parts: &[&str], edit: fn(&mut Value)| refuse(&WITH_MODEL, parts, |w| shard(w, edit));
    sharded(&["model-00002.safetensors"], |index| {
        index["weight_map"][TABLE] = json!("model-00002.safetensors");
    });
    sharded(&["index.json", TABLE, "../other.safetensors"], |index| {
        index["weight_map"][TABLE] = json!("../other.safetensors");
    });
    sharded(&["index.json", "weight_map"], |index| {
        index["weight_map"] = json!(["a"]);
    });
    sharded(&["index.json", "weight_map"], |index| {
        index.as_object_mut().unwrap().remove("weight_map");
    });
    sharded(&["model-00001-of-00001.safetensors", "no.such.weight"], |index| {
        index["weight_map"]["no.such.weight"] = json!("model-00001-of-00001.safetensors");
    });
    refuse(&WITH_MODEL, &["index.json"], |workspace| {
        shard(workspace, |_| {});
        truncate(workspace, INDEX, 200);
    });
    refuse(&WITH_MODEL, &["model-00001-of-00001.safetensors"], |workspace| {
        shard(workspace, |_| {});
        truncate(workspace, "model/model-00001-of-00001.safetensors", 2000);
    });
}

#[test]
fn missing_and_malformed_tokenizers() {
    let by_string = |workspace: &Workspace, command: &str| {
        let mut args = set(workspace.command(command), "--token-ids", "the");
        let at = args.iter().position(|arg| arg == "--token-ids").unwrap();
        args[at] = "--tokens".into();
        args
    };
    for content in [
        None,
        Some(""),
        Some("{"),
        Some("[]"),
        Some("{\"version\": \"1.0\"}"),
    ] {
        let workspace = Workspace::new();
        match content {
            None => remove(&workspace, TOKENIZER),
            Some(content) => fs::write(workspace.path(TOKENIZER), content).unwrap(),
        }
        for command in ["train", "init"] {
            workspace.refuses(&by_string(&workspace, command), &["model/tokenizer.json"]);
        }
        fs::write(workspace.data(), "{\"text\": \"the cat sat\"}\n").unwrap();
        for command in WITH_DATA {
            workspace.refuses(&workspace.command(command), &["model/tokenizer.json"]);
        }
        let text = workspace.path("data.txt");
        fs::write(&text, "the cat sat").unwrap();
        for command in WITH_DATA {
            let args = set(workspace.command(command), "--data", &text);
            workspace.refuses(&args, &["model/tokenizer.json"]);
        }
        if content.is_some() {
            let args = workspace.command("inspect model");
            workspace.refuses(&args, &["model/tokenizer.json"]);
        }
    }
    // A string that the tokenizer knows, under an id that the table has not.
    let workspace = Workspace::new();
    edit_json(&workspace.path(TOKENIZER), |tokenizer| {
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        vocabulary.remove("the").unwrap();
        vocabulary.insert("the".to_owned(), json!(301));
    });
    for command in ["train", "init"] {
        workspace.refuses(&by_string(&workspace, command), &["301", "300"]);
    }
}

#[test]
fn malformed_data() {
    let good = r#"{"input_ids": [1, 2, 3]}"#;
    let long = json!({"input_ids": vec![5; 65]}).to_string();
    for (line, part) in [
        ("not JSON", ""),
        ("{\"input_ids\": [1, 2, 3]", ""),
        ("[1, 2, 3]", "object"),
        ("[[1, 2, 3], null, null]", "object"),
        ("\"text\"", "object"),
        ("null", "object"),
        ("{}", "input_ids"),
        (r#"{"ids": [1, 2, 3]}"#, "input_ids"),
        (r#"{"input_ids": ["1", "2"]}"#, ""),
        (r#"{"input_ids": [1.0, 2.0]}"#, ""),
        (r#"{"input_ids": [1.5, 2]}"#, ""),
        (r#"{"input_ids": "1 2 3"}"#, ""),
        (r#"{"input_ids": [[1, 2, 3]]}"#, ""),
        (r#"{"input_ids": [1, true]}"#, ""),
        (r#"{"input_ids": [1, null]}"#, ""),
        (r#"{"input_ids": []}"#, "0 tokens"),
        (r#"{"input_ids": [1]}"#, "1 token"),
        (r#"{"input_ids": [1, 300]}"#, "input_ids[1] is 300"),
        (r#"{"input_ids": [1, -1]}"#, "input_ids[1] is -1"),
        (r#"{"input_ids": [4294967297, 2]}"#, "input_ids[0] is 4294967297"),
        (r#"{"input_ids": [99999999999999999999, 2]}"#, ""),
        (
            r#"{"input_ids": [1, 2], "labels": [1]}"#,
            "1 labels for 2 input_ids",
        ),
        (
            r#"{"input_ids": [1, 2], "labels": [1, 2, 3]}"#,
            "3 labels for 2 input_ids",
        ),
        (r#"{"input_ids": [1, 2], "labels": [1, 300]}"#, "labels[1] is 300"),
        (r#"{"input_ids": [1, 2], "labels": [1, -1]}"#, "labels[1] is -1"),
        (r#"{"input_ids": [1, 2], "labels": [1, "2"]}"#, ""),
        (r#"{"input_ids": [1, 2], "input_ids": [1, 2]}"#, "input_ids"),
        (r#"{"text": 5}"#, ""),
        (r#"{"text": ""}"#, "0 tokens"),
        (r#"{"text": "the"}"#, "1 token"),
        (&long, "65 tokens"),
    ] {
        // The second example stands in the third line, after a blank one.
        let content = format!("{good}\n\n{line}\n{good}\n");
        refuse_file(&WITH_DATA, &["data.jsonl, line 3", part], "data.jsonl", content);
    }
    let invalid = [good.as_bytes(), b"\n\xff\n"].concat();
    refuse_file(
        &WITH_DATA,
        &["data.jsonl, line 2", "UTF-8"],
        "data.jsonl",
        invalid,
    );
    for content in ["", "\n\n  \n"] {
        refuse_file(&WITH_DATA, &["data.jsonl", "no example"], "data.jsonl", content);
    }
    let ignored = "{\"input_ids\": [1, 2], \"labels\": [1, -100]}\n";
    refuse_file(
        &WITH_DATA,
        &["data.jsonl", "lines 1", "no target"],
        "data.jsonl",
        ignored,
    );
    refuse(&WITH_DATA, &["data.jsonl"], |workspace| {
        remove(workspace, "data.jsonl");
    });
    refuse(&WITH_DATA, &["data.jsonl"], |workspace| {
        remove(workspace, "data.jsonl");
        fs::create_dir(workspace.data()).unwrap();
    });
    // A text too short for a window.
    let workspace = Workspace::new();
    let text = workspace.path("data.txt");
    for content in ["", "the"] {
        fs::write(&text, content).unwrap();
        for command in WITH_DATA {
            let args = set(workspace.command(command), "--data", &text);
            workspace.refuses(&args, &["data.txt", "no example"]);
        }
    }
}

#[test]
fn malformed_input_ids() {
    let long = json!([vec![5; 65]]).to_string();
    for (content, part) in [
        ("", "not a JSON list of lists"),
        ("[[1, 2]", "not a JSON list of lists"),
        ("{}", "not a JSON list of lists"),
        ("[1, 2]", "not a JSON list of lists"),
        ("[[\"1\"]]", "not a JSON list of lists"),
        ("[[1.0]]", "not a JSON list of lists"),
        ("[[[1]]]", "not a JSON list of lists"),
        ("[[1], null]", "not a JSON list of lists"),
        ("[[1]] [[1]]", "not a JSON list of lists"),
        ("[]", "no token id"),
        ("[[]]", "no token id"),
        ("[[], []]", "no token id"),
        ("[[1, 2], [3]]", "list 1"),
        ("[[1, 2], []]", "list 1"),
        ("[[1, 2], [3, 300]]", "300 at [1][1]"),
        ("[[-1, 2], [3, 30]]", "-1 at [0][0]"),
        ("[[4294967297]]", "4294967297 at [0][0]"),
        (&long, "65"),
    ] {
        refuse_file(&["forward"], &["ids.json", part], "ids.json", content);
    }
    refuse(&["forward"], &["ids.json"], |workspace| {
        remove(workspace, "ids.json");
    });
}

#[test]
fn token_ids_that_cannot_train() {
    let workspace = Workspace::new();
    for (ids, parts) in [
        ("300", &["300", "300 rows"][..]),
        ("5,4294967295", &["4294967295", "300 rows"]),
        ("290-310", &["310", "300 rows"]),
        ("5,7,5", &["5", "twice"]),
        ("5-8,7", &["7", "twice"]),
        ("0-299,0-299", &["twice"]),
        ("0-4294967295", &["4294967295"]),
    ] {
        for command in ["train", "init"] {
            let args = set(workspace.command(command), "--token-ids", ids);
            workspace.refuses(&args, parts);
        }
    }
}

#[test]
fn missing_and_malformed_adapters() {
    refuse(&WITH_ADAPTER, &["/adapter"], |workspace| {
        remove(workspace, "adapter");
    });
    refuse(&WITH_ADAPTER, &["adapter_config.json"], |workspace| {
        remove(workspace, "adapter/adapter_config.json");
    });
    refuse(&WITH_ADAPTER, &["adapter_model.safetensors"], |workspace| {
        remove(workspace, ROWS);
    });
    refuse(
        &WITH_ADAPTER,
        &["adapter_model.bin", "adapter_model.safetensors"],
        |workspace| {
            remove(workspace, ROWS);
            fs::write(workspace.path("adapter/adapter_model.bin"), "pickle").unwrap();
        },
    );
    for cut in [0, 8, 100, 300, 927] {
        refuse(&WITH_ADAPTER, &["adapter_model.safetensors"], |workspace| {
            truncate(workspace, ROWS, cut);
        });
    }
    let healthy = fs::read_to_string(fixture("llama_untied/adapter/adapter_config.json")).unwrap();
    let array = format!("[{healthy}]");
    for content in ["", "{", &healthy[..200], &array, "null", "{}"] {
        refuse_file(
            &WITH_ADAPTER,
            &["adapter_config.json"],
            "adapter/adapter_config.json",
            content,
        );
    }
    for (ids, part) in [
        (json!([299, 297, 298]), "adapter_model.safetensors"),
        (json!([299, 297, 298, 12, 13]), "adapter_model.safetensors"),
        (json!([299, 297, 298, 298]), "token_indices"),
        (json!([299, 297, 298, -1]), "token_indices[3]"),
        (json!([299, 297, 298, "12"]), "token_indices[3]"),
        (json!("12"), "token_indices"),
    ] {
        refuse(&WITH_ADAPTER, &[part], |workspace| {
            let path = workspace.path("adapter/adapter_config.json");
            edit_json(&path, |config| config["token_indices"] = ids);
        });
    }
}

#[test]
fn adapters_of_another_model() {
    let without_verify = ["eval", "forward", "merge", "inspect adapter"];
    // Rows of another length.
    let other = |workspace: &Workspace| {
        remove(workspace, "adapter");
        copy_dir(&fixture("llama_tied/adapter"), &workspace.adapter());
    };
    refuse(&without_verify, &["/model", "40", "48"], other);
    // An id beyond the table.
    let beyond = |workspace: &Workspace| {
        let path = workspace.path("adapter/adapter_config.json");
        edit_json(&path, |config| config["token_indices"][1] = json!(300));
    };
    refuse(
        &without_verify,
        &["/model", "token_indices[1] is 300", "300 rows"],
        beyond,
    );
    // Of a module that the model has not.
    let module = |workspace: &Workspace| {
        remove(workspace, "adapter");
        copy_dir(&fixture("malformed/_base/adapter"), &workspace.adapter());
    };
    refuse(&without_verify, &["/model", "emb.weight"], module);
    // Of a table with other values.
    let digest = |workspace: &Workspace| {
        run(&workspace.command("init")).ok();
        remove(workspace, "adapter");
        fs::rename(workspace.out(), workspace.adapter()).unwrap();
        edit_tensors(&workspace.path(WEIGHTS), |tensors| {
            tensors.get_mut(TABLE).unwrap().2[7] ^= 1;
        });
    };
    refuse(&without_verify[..3], &["/model", "sha256:", TABLE], digest);
    let halves = |workspace: &Workspace| {
        run(&workspace.command("init")).ok();
        remove(workspace, "adapter");
        fs::rename(workspace.out(), workspace.adapter()).unwrap();
        edit_tensors(&workspace.path(WEIGHTS), |tensors| {
            let (dtype, _, bytes) = tensors.get_mut(TABLE).unwrap();
            *dtype = Dtype::BF16;
            bytes.truncate(300 * 48 * 2);
        });
    };
    refuse(&without_verify[..3], &["/model", "F32", "BF16"], halves);

    // `verify` shows its findings too.
    let spoilers: [(Spoil<'_>, &[&str]); 4] = [
        (&other, &["40", "48"]),
        (&beyond, &["token_indices[1] is 300", "300 rows"]),
        (&module, &["emb.weight"]),
        (&digest, &["sha256:"]),
    ];
    for (spoil, parts) in spoilers {
        let workspace = Workspace::new();
        spoil(&workspace);
        let before = workspace.snapshot();
        let args = workspace.command_with("verify", &["--json"]);
        let run = run(&args);
        run.failed(&[&["/adapter does not fit model", "/model"], parts].concat());
        assert_eq!(run.json()["fits"], json!(false), "{run:#?}");
        workspace.unchanged(&before, &args);
    }
}

#[test]
fn the_malformed_adapters_of_the_fixtures() {
    let mut refused = 0;
    let all = fixture("malformed");
    for entry in fs::read_dir(&all).unwrap() {
        let dir = entry.unwrap().path();
        if dir.ends_with("_base") {
            continue;
        }
        let kind = read_json(&dir.join("case.json"))["kind"].clone();
        let (base, adapter) = (all.join("_base/base"), dir.join("adapter"));
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        let merge = run(&args![
            "merge",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            merged
        ]);
        let inspect = run(&args!["inspect", adapter]);
        inspect.survived();
        merge.survived();
        let code = match kind.as_str().unwrap() {
            "accept" => 0,
            "error" => 1,
            _ => merge.code.unwrap(),
        };
        assert_eq!(merge.code, Some(code), "{merge:#?}");
        if code == 1 {
            merge.refused(&[]);
            assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{dir:?}");
            refused += 1;
        } else {
            assert_eq!(inspect.code, Some(0), "{inspect:#?}");
            assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "{dir:?}");
        }
    }
    assert!(refused > 50, "{refused}");
}

#[test]
fn settings_out_of_range() {
    let workspace = Workspace::new();
    for (setting, part) in [
        ("--lr=-1", "lr is -1"),
        ("--lr=nan", "lr is NaN"),
        ("--lr=inf", "lr is inf"),
        ("--beta1=1", "beta"),
        ("--beta1=-0.1", "beta"),
        ("--beta2=1", "beta"),
        ("--eps=-1", "eps"),
        ("--weight-decay=-1", "weight"),
        ("--weight-decay=nan", "weight"),
        ("--max-grad-norm=0", "norm"),
        ("--max-grad-norm=-1", "norm"),
        ("--max-grad-norm=nan", "norm"),
        ("--target-modules=lm_head", "'lm_head'"),
        ("--target-modules=embed_tokens,mlp", "'mlp'"),
        ("--target-modules=tokens", "'tokens'"),
        ("--max-length=1", "max-length"),
    ] {
        workspace.refuses(&workspace.command_with("train", &[setting]), &[part]);
    }
    workspace.refuses(
        &workspace.command_with("eval", &["--max-length=1"]),
        &["max-length"],
    );
    // A number below 0 is no option.
    workspace.refuses(&workspace.command_with("train", &["--lr", "-1"]), &["lr is -1"]);
    for size in ["65537", "4000000000", "18446744073709551615"] {
        let args = set(
            workspace.command_with("train", &["--steps=1"]),
            "--batch-size",
            size,
        );
        workspace.refuses(&args, &["batch-size", size]);
    }
    let sgd = workspace.command_with("train", &["--optimizer=sgd", "--momentum=-1"]);
    workspace.refuses(&sgd, &["momentum"]);
    let toward = workspace.command_with("train", &["--decay-toward=original", "--weight-decay=-1"]);
    workspace.refuses(&toward, &["decay"]);
    for command in WITH_DECODER {
        for device in ["cuda", "cuda:1", "metal"] {
            if cfg!(any(feature = "cuda", feature = "metal")) {
                continue;
            }
            let args = workspace.command_with(command, &["--device", device]);
            workspace.refuses(&args, &["built without", "--device cpu"]);
        }
    }
}

#[test]
fn losses_that_are_no_numbers() {
    let workspace = Workspace::new();
    let args = workspace.command_with(
        "train",
        &["--lr=1e300", "--steps=20", "--optimizer=sgd", "--save-every=50"],
    );
    workspace.refuses(&args, &["loss", "at step", "learning rate", "lines 1, 2"]);
    // Nor does it touch the one that is there.
    copy_dir(&fixture("llama_untied/adapter"), &workspace.out());
    workspace.refuses(&[args, args!["--force"]].concat(), &["loss", "at step"]);

    // The last step's rows are not in any loss.
    let workspace = Workspace::new();
    for optimizer in ["--optimizer=sgd", "--optimizer=adamw"] {
        let args = workspace.command_with("train", &["--lr=1e300", "--steps=1", optimizer]);
        workspace.refuses(&args, &["token id 299", "not finite", "learning rate"]);
    }
    let nan = f32::NAN.to_le_bytes();
    let spoil = edit_weights(|tensors| {
        let (.., bytes) = tensors.get_mut("model.norm.weight").unwrap();
        bytes[..4].copy_from_slice(&nan);
    });
    let workspace = Workspace::new();
    spoil(&workspace);
    workspace.refuses(&workspace.command("train"), &["NaN"]);
    workspace.refuses(&workspace.command("eval"), &["/model", "data.jsonl", "NaN"]);
}

#[test]
fn outputs_that_cannot_be_written() {
    let long = "x".repeat(300);
    for name in WITH_OUTPUT {
        let workspace = Workspace::new();
        let file = workspace.path("file");
        fs::write(&file, "precious").unwrap();
        // The parent is a file.
        for out in [file.join("out"), file.join("more/out")] {
            for more in [&[][..], &["--force"]] {
                let args = set(workspace.command_with(name, more), "--out", &out);
                workspace.refuses(&args, &["/file"]);
            }
        }
        // The name is too long, or there is none.
        for out in [workspace.path(&long), "/".into(), "..".into()] {
            let args = set(workspace.command_with(name, &["--force"]), "--out", &out);
            workspace.refuses(&args, &[]);
        }
        // A link to nothing.
        std::os::unix::fs::symlink(workspace.path("nothing"), workspace.path("link")).unwrap();
        let args = set(workspace.command(name), "--out", workspace.path("link"));
        let link = run(&args);
        link.refused(&["/link"]);
        fs::remove_file(workspace.path("link")).unwrap();
        assert!(!workspace.path("nothing").exists());
        // Parents that are missing are made, and only if all went well.
        let deep = workspace.path("a/b/out");
        let bad = set(workspace.command(name), "--out", &deep);
        let option = if name == "extract" { "--base" } else { "--model" };
        let bad = set(bad, option, workspace.path("nothing"));
        workspace.refuses(&bad, &["/nothing"]);
        run(&set(workspace.command(name), "--out", &deep)).ok();
        assert!(deep.exists());
    }
    let workspace = Workspace::new();
    for metrics in ["nowhere/metrics.jsonl", "data.jsonl/metrics.jsonl", "model"] {
        let path = workspace.path(metrics);
        let args = workspace.command_with("train", &["--force", "--metrics", &path.to_string_lossy()]);
        workspace.refuses(&args, &[metrics]);
    }
}

#[test]
fn merging_into_the_base_or_the_same_token_twice() {
    let workspace = Workspace::new();
    let model = workspace.model();
    let inside = model.join("merged");
    for (out, more) in [
        (&model, &["--force"][..]),
        (&inside, &[]),
        (&inside, &["--force"]),
    ] {
        let args = set(workspace.command_with("merge", more), "--out", out);
        workspace.refuses(&args, &["/model"]);
    }
    let adapter = workspace.adapter().to_string_lossy().into_owned();
    let twice = workspace.command_with("merge", &["--adapter", &adapter]);
    workspace.refuses(&twice, &["/adapter", "given once"]);

    // Another adapter that shares one token.
    run(&set(workspace.command("init"), "--token-ids", "40,12")).ok();
    let second = workspace.path("second");
    fs::rename(workspace.out(), &second).unwrap();
    let shown = second.to_string_lossy().into_owned();
    for args in [
        workspace.command_with("merge", &["--adapter", &shown]),
        workspace.command_with("merge", &["--force", "--adapter", &shown]),
    ] {
        workspace.refuses(&args, &["token id 12", "/adapter", "/second"]);
    }
    // A second one of a model with another table.
    let other = workspace.path("other");
    copy_dir(&workspace.tuned(), &other);
    run(&set(
        set(workspace.command("init"), "--model", &other),
        "--token-ids",
        "40,41",
    ))
    .ok();
    fs::rename(workspace.out(), workspace.path("third")).unwrap();
    let third = workspace.path("third").to_string_lossy().into_owned();
    let args = workspace.command_with("merge", &["--adapter", &third]);
    workspace.refuses(
        &args,
        &["/third was trained on a table of", "model.embed_tokens.weight"],
    );
    // A second one that is broken, or of other tokens.
    let missing = workspace.command_with("merge", &["--adapter", "no-such-adapter"]);
    workspace.refuses(&missing, &["no-such-adapter"]);
    fs::remove_dir_all(&second).unwrap();
    run(&set(workspace.command("init"), "--token-ids", "40,41")).ok();
    fs::rename(workspace.out(), &second).unwrap();
    let both = workspace.command_with("merge", &["--json", "--adapter", &shown]);
    assert_eq!(run(&both).ok().json()["rows"], 6);
}

#[test]
fn states_that_cannot_be_resumed() {
    let workspace = Workspace::new();
    let part = workspace.path("part");
    let train = |more: &[&str]| {
        let args = set(workspace.command("train"), "--batch-size", "1");
        [args, more.iter().map(OsString::from).collect()].concat()
    };
    run(&set(train(&["--steps=3", "--save-every=1"]), "--out", &part)).ok();
    let from = part.to_string_lossy().into_owned();
    let resume = |more: &[&str]| train(&[&["--resume", &from, "--steps", "5"], more].concat());
    run(&resume(&[])).ok();
    remove(&workspace, "out");

    let state = "training_state.safetensors";
    workspace.refuses(&set(resume(&[]), "--steps", "2"), &[state, "3 steps", "2"]);
    workspace.refuses(&set(resume(&[]), "--token-ids", "299,13"), &[state, "token ids"]);
    workspace.refuses(&set(resume(&[]), "--token-ids", "12,299"), &[state, "token ids"]);
    workspace.refuses(&set(resume(&[]), "--batch-size", "2"), &[state, "batch size"]);
    workspace.refuses(&resume(&["--optimizer=sgd"]), &[state, "optimizer"]);
    workspace.refuses(&resume(&["--seed=1"]), &[state, "seed"]);
    workspace.refuses(&resume(&["--shuffle"]), &[state, "shuffle"]);
    // The same run on another model.
    let tuned = set(resume(&[]), "--model", workspace.tuned());
    workspace.refuses(
        &tuned,
        &["/part does not fit model", "/tuned", "was trained on a table"],
    );
    let data = fs::read(workspace.data()).unwrap();
    fs::write(workspace.data(), [&data[..], &data[..]].concat()).unwrap();
    workspace.refuses(&resume(&[]), &[state, "number of examples"]);
    // The same lines in another order.
    let mut lines: Vec<&[u8]> = data.split_inclusive(|byte| *byte == b'\n').collect();
    lines.reverse();
    fs::write(workspace.data(), lines.concat()).unwrap();
    workspace.refuses(&resume(&[]), &[state, "in another order"]);
    fs::write(workspace.data(), data).unwrap();

    workspace.refuses(&set(resume(&[]), "--resume", "no-such-run"), &["no-such-run"]);
    workspace.refuses(
        &set(resume(&[]), "--resume", workspace.adapter()),
        &["/adapter", state],
    );
    let path = part.join(state);
    let healthy = fs::read(&path).unwrap();
    for cut in [0, 7, 100, healthy.len() / 2, healthy.len() - 1] {
        fs::write(&path, &healthy[..cut]).unwrap();
        workspace.refuses(&resume(&[]), &[state]);
    }
    fs::copy(workspace.path(ROWS), &path).unwrap();
    workspace.refuses(&resume(&[]), &[state]);
    // The state of another step of the same run.
    let earlier = workspace.path("earlier");
    run(&set(train(&["--steps=2", "--save-every=1"]), "--out", &earlier)).ok();
    fs::copy(earlier.join(state), &path).unwrap();
    workspace.refuses(
        &resume(&[]),
        &[state, "not the state of the adapter beside it", "step 2"],
    );
    fs::write(&path, healthy).unwrap();
    // Rows of another run.
    fs::write(part.join("adapter_model.safetensors"), "").unwrap();
    workspace.refuses(&resume(&[]), &["adapter_model.safetensors"]);
}

#[test]
fn evaluation_data_that_is_bad() {
    let workspace = Workspace::new();
    let held_out = workspace.path("held-out.jsonl");
    let args = workspace.command_with("train", &["--eval-data", &held_out.to_string_lossy()]);
    workspace.refuses(&args, &["held-out.jsonl"]);
    fs::write(&held_out, "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 999]}\n").unwrap();
    workspace.refuses(&args, &["held-out.jsonl, line 2", "999"]);
    // Of several files the one at fault is named.
    for option in ["--data", "--eval-data"] {
        let args = workspace.command_with(
            "train",
            &[
                "--eval-data",
                &workspace.data().to_string_lossy(),
                option,
                &held_out.to_string_lossy(),
            ],
        );
        workspace.refuses(&args, &["held-out.jsonl, line 2", "999"]);
    }
}

#[test]
fn a_full_disk() {
    for (name, kib) in [
        ("train", 0),
        ("forward", 0),
        ("forward", 2),
        ("init", 0),
        ("merge", 0),
        ("merge", 100),
    ] {
        for fresh in [true, false] {
            let workspace = Workspace::new();
            let out = workspace.out();
            match (fresh, name) {
                (true, _) => {}
                (false, "forward") => fs::write(&out, "old").unwrap(),
                (false, _) => copy_dir(&fixture("llama_tied/adapter"), &out),
            }
            let before = workspace.snapshot();
            let args = workspace.command_with(name, if fresh { &[] } else { &["--force"] });
            run_with_file_limit(kib, &args).refused(&["out"]);
            workspace.unchanged(&before, &args);
        }
    }
    // What was there is kept when a save on the way fails, and what was saved before is whole.
    let workspace = Workspace::new();
    let before = workspace.snapshot();
    let args = workspace.command_with("train", &["--steps=4", "--save-every=1"]);
    run_with_file_limit(0, &args).refused(&["out"]);
    workspace.unchanged(&before, &args);

    // Metrics stream: what was measured stays, and no adapter is written after they failed.
    let metrics = workspace.path("metrics.jsonl");
    let shown = metrics.to_string_lossy().into_owned();
    let args = workspace.command_with("train", &["--steps=40", "--metrics", &shown]);
    for kib in [0, 1] {
        run_with_file_limit(kib, &args).refused(&["metrics", &shown]);
        let written = fs::metadata(&metrics).unwrap().len();
        assert!(written <= u64::from(kib) * 1024, "{written}");
        fs::remove_file(&metrics).unwrap();
        workspace.unchanged(&before, &args);
    }
    // A limit above what is written is none.
    for name in WITH_OUTPUT {
        run_with_file_limit(1024, &workspace.command_with(name, &["--force"])).ok();
        remove(&workspace, "out");
    }
}

#[test]
fn strange_names_stay_on_one_line() {
    let workspace = Workspace::new();
    for name in ["two\nlines", "tab\tand\rreturn", "\u{1b}[31mred"] {
        for command in [
            args!["inspect", workspace.path(name)],
            args!["eval", "--model", workspace.path(name), "--data", "x"],
        ] {
            let run = run(&command);
            run.refused(&[]);
            assert!(
                !run.stderr.trim_end_matches('\n').contains(char::is_control),
                "{run:#?}"
            );
        }
    }
    let missing = set(
        workspace.command("eval"),
        "--data",
        workspace.path("two\nlines.jsonl"),
    );
    workspace.refuses(&missing, &["two\\nlines.jsonl", "No such file"]);
}

/// Evenly spaced places in `0..length`, the ends among them.
fn places(length: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |at| at * (length - 1) / (count - 1))
}

#[test]
fn truncated_files_are_never_more_than_an_error() {
    for (file, commands) in [
        (WEIGHTS, &["eval", "merge", "extract", "diff", "inspect file"][..]),
        (ROWS, &["forward", "merge", "verify"]),
        ("adapter/adapter_config.json", &["eval", "inspect adapter"]),
        (CONFIG, &["eval", "inspect model"]),
        (TOKENIZER, &["inspect model"]),
    ] {
        let workspace = Workspace::new();
        let healthy = fs::read(workspace.path(file)).unwrap();
        let healthy = healthy.trim_ascii_end();
        for length in places(healthy.len(), 20) {
            fs::write(workspace.path(file), &healthy[..length]).unwrap();
            for name in commands {
                workspace.refuses(
                    &workspace.command(name),
                    &[Path::new(file).file_name().unwrap().to_str().unwrap()],
                );
            }
        }
    }
}

#[test]
fn flipped_bytes_are_never_more_than_an_error() {
    for (file, places_from, commands) in [
        // The header, and a little of the data.
        (WEIGHTS, 2400, &["eval", "merge", "extract", "diff"][..]),
        (ROWS, 928, &["forward", "verify", "merge"]),
        ("adapter/adapter_config.json", 433, &["eval", "inspect adapter"]),
        (CONFIG, 712, &["eval", "train"]),
        ("data.jsonl", 80, &["eval", "train"]),
        ("ids.json", 29, &["forward"]),
        (INDEX, 300, &["eval", "merge"]),
    ] {
        let workspace = Workspace::new();
        if file == INDEX {
            shard(&workspace, |_| {});
        }
        let healthy = fs::read(workspace.path(file)).unwrap();
        let mut outcomes = [0, 0];
        for (round, place) in places(places_from.min(healthy.len()), 29).enumerate() {
            let mut bytes = healthy.clone();
            bytes[place] ^= [1, 4, 16, 128][round % 4];
            fs::write(workspace.path(file), bytes).unwrap();
            for name in commands {
                let run = run(&workspace.command_with(name, &["--force"]));
                let exits = run.code.unwrap_or(-1);
                // Findings of `verify` go to standard output.
                match (exits, *name) {
                    (1, "verify") => run.failed(&[]),
                    (1, _) => run.refused(&[]),
                    _ => run.survived(),
                }
                outcomes[usize::from(exits == 1)] += 1;
            }
        }
        assert!(outcomes[1] > 0, "{file}: {outcomes:?}");
    }
}

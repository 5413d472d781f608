//! `extract` and `diff`: the way back from a tuned model, and what differs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Workspace, args, checkpoint_tensors, edit_json, edit_tensors, fixture, read_tensors, run};

const TABLE: &str = "model.embed_tokens.weight";
const DELTA: &str = "base_model.model.model.embed_tokens.trainable_tokens_delta";

fn extract(base: &Path, tuned: &Path, out: &Path) -> Vec<OsString> {
    args![
        "extract", "--json", "--base", base, "--tuned", tuned, "--out", out
    ]
}

fn floats(values: &[u8]) -> Vec<f32> {
    let values = values.chunks_exact(4);
    values
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

#[test]
fn what_was_merged_comes_back() {
    for case in ["llama_untied", "llama_tied", "gemma2_tied", "qwen2_sharded"] {
        let home = tempfile::tempdir().unwrap();
        let (out, again) = (home.path().join("adapter"), home.path().join("merged"));
        let (base, merged) = (fixture(case).join("base"), fixture(case).join("merged"));
        let report = run(&extract(&base, &merged, &out)).ok().json();
        let theirs = support::read_json(&fixture(case).join("adapter/adapter_config.json"));
        let mut ids: Vec<u64> = serde_json::from_value(theirs["token_indices"].clone()).unwrap();
        ids.sort_unstable();
        assert_eq!(report["token_indices"], json!(ids), "{case}");
        assert_eq!(report["modules"], json!(["model.embed_tokens"]));
        let config = support::read_json(&out.join("adapter_config.json"));
        assert_eq!(config["token_indices"], json!(ids), "{case}");
        assert_eq!(config["base_model_name_or_path"], json!(base));
        let merge = args!["merge", "--model", base, "--adapter", out, "--out", again];
        run(&merge).ok();
        assert_eq!(checkpoint_tensors(&again), checkpoint_tensors(&merged), "{case}");
        run(&args!["verify", "--model", base, "--adapter", out]).ok();
        let diff = run(&args!["diff", "--json", again, merged]).ok().json();
        assert_eq!(diff["equal"], json!(true), "{case}: {diff}");
        let text = run(&args!["diff", again, merged]).ok();
        assert!(text.stdout.contains("equal"), "{text:#?}");
    }
}

/// The embedding and a head of its own change in different tokens, and the vocabulary grows.
#[test]
fn two_tables_and_new_tokens_make_one_adapter() {
    let workspace = Workspace::new();
    let (base, tuned, out) = (workspace.model(), workspace.path("grown"), workspace.out());
    support::copy_dir(&base, &tuned);
    edit_json(&tuned.join("config.json"), |config| {
        config["vocab_size"] = json!(302);
    });
    edit_tensors(&tuned.join("model.safetensors"), |tensors| {
        for (name, id) in [(TABLE, 7), ("lm_head.weight", 12)] {
            let (_, shape, bytes) = tensors.get_mut(name).unwrap();
            let row_bytes = bytes.len() / shape[0];
            bytes[id * row_bytes] ^= 1;
            shape[0] = 302;
            let row = bytes[..row_bytes].to_vec();
            bytes.extend(row.repeat(2));
        }
    });
    let report = run(&extract(&base, &tuned, &out)).ok().json();
    assert_eq!(report["token_indices"], json!([7, 12, 300, 301]));
    assert_eq!(report["modules"], json!(["lm_head", "model.embed_tokens"]));
    assert_eq!(report["vocab_size"], json!(302));
    // The tokenizer does not know the new tokens.
    assert_eq!(report["tokens"], json!(null));
    let merged = workspace.path("again");
    run(&args![
        "merge",
        "--model",
        base,
        "--adapter",
        out,
        "--out",
        merged
    ])
    .ok();
    assert_eq!(checkpoint_tensors(&merged), checkpoint_tensors(&tuned));
    let config = support::read_json(&merged.join("config.json"));
    assert_eq!(config["vocab_size"], json!(302));

    let diff = run(&args!["diff", "--json", "--limit", "2", base, tuned])
        .ok()
        .json();
    assert_eq!((&diff["kind"], &diff["equal"]), (&json!("models"), &json!(false)));
    assert_eq!(diff["tensors"], json!([]));
    let [head, embedding] = &diff["tables"].as_array().unwrap()[..] else {
        panic!("{diff}");
    };
    assert_eq!(
        (&head["name"], &embedding["name"]),
        (&json!("lm_head.weight"), &json!(TABLE))
    );
    for (table, id) in [(head, 12), (embedding, 7)] {
        let counts = ["changed", "only_in_a", "only_in_b"].map(|field| table[field].clone());
        assert_eq!(counts, [json!(1), json!(0), json!(2)]);
        let [changed, new] = &table["rows"].as_array().unwrap()[..] else {
            panic!("{table}");
        };
        assert_eq!(
            (&changed["token_id"], &changed["in"]),
            (&json!(id), &json!("both"))
        );
        assert!(changed["distance"].as_f64().unwrap() > 0.0, "{changed}");
        assert!(changed["token"].is_string(), "{changed}");
        assert_eq!(new, &json!({"token_id": 300, "token": null, "in": "b"}));
    }
    let back = run(&args!["diff", "--json", tuned, base]).ok().json();
    assert_eq!(back["tables"][0]["only_in_a"], json!(2));
    assert_eq!(back["tables"][0]["rows"][2]["in"], json!("a"));
}

#[test]
fn what_cannot_be_extracted_is_refused() {
    let workspace = Workspace::new();
    let (base, tuned, out) = (workspace.model(), workspace.tuned(), workspace.out());
    let weights = tuned.join("model.safetensors");
    let healthy = fs::read(&weights).unwrap();
    workspace.refuses(&extract(&base, &base, &out), &["/model", "same tensors"]);
    edit_tensors(&weights, |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().2[0] ^= 1;
        let head = tensors.remove("lm_head.weight").unwrap();
        tensors.insert("other".to_owned(), head);
    });
    let parts = [
        "/tuned",
        "\"lm_head.weight\" (only in the first)",
        "\"model.norm.weight\" (values)",
        "\"other\" (only in the second)",
    ];
    workspace.refuses(&extract(&base, &tuned, &out), &parts);
    let diff = run(&args!["diff", "--json", base, tuned]).ok().json();
    assert_eq!(
        diff["tensors"],
        json!([
            {"name": "lm_head.weight", "difference": "only_in_a"},
            {"name": "model.norm.weight", "difference": "values"},
            {"name": "other", "difference": "only_in_b"},
        ])
    );
    fs::write(&weights, &healthy).unwrap();
    edit_tensors(&weights, |tensors| {
        let (dtype, _, bytes) = tensors.get_mut(TABLE).unwrap();
        *dtype = safetensors::Dtype::BF16;
        bytes.truncate(bytes.len() / 2);
    });
    workspace.refuses(
        &extract(&base, &tuned, &out),
        &[TABLE, "element types F32 and BF16"],
    );
    let diff = run(&args!["diff", "--json", base, tuned]).ok().json();
    assert_eq!(
        diff["tensors"],
        json!([{"name": TABLE, "difference": "dtype", "a": "F32", "b": "BF16"}])
    );
    fs::write(&weights, &healthy).unwrap();
    let few = [extract(&base, &tuned, &out), args!["--max-rows", "1"]].concat();
    workspace.refuses(&few, &["rows of model.embed_tokens.weight", "limit of 1"]);
    run(&[few, args!["--max-rows", "0"]].concat()).misused(&["--max-rows"]);
    // An output that would take an input with it.
    for inside in [&base, &tuned] {
        let args = [extract(&base, &tuned, inside), args!["--force"]].concat();
        workspace.refuses(&args, &[&inside.to_string_lossy()]);
    }
}

#[test]
fn adapters_are_compared_token_by_token() {
    let workspace = Workspace::new();
    let (first, second) = (workspace.adapter(), workspace.out());
    run(&workspace.command("extract")).ok();
    let diff = |a: &Path, b: &Path| run(&args!["diff", "--json", a, b]).ok().json();
    // The same tokens in another order.
    let same = diff(&first, &second);
    assert_eq!(
        (&same["kind"], &same["equal"], &same["tables"][0]["name"]),
        (&json!("adapters"), &json!(true), &json!("model.embed_tokens"))
    );
    let rows = same["tables"][0]["rows"].as_array().unwrap();
    let ids: Vec<_> = rows.iter().map(|row| row["token_id"].clone()).collect();
    let config = support::read_json(&first.join("adapter_config.json"));
    assert_eq!(json!(ids), config["token_indices"]);
    // The second recorded its strings.
    assert!(rows.iter().all(|row| row["token"].is_string()), "{same}");

    run(&args![
        "init",
        "--force",
        "--model",
        workspace.model(),
        "--token-ids",
        "299,12",
        "--out",
        second
    ])
    .ok();
    let other = diff(&first, &second);
    let table = &other["tables"][0];
    let by_id = |id: u64| {
        let rows = table["rows"].as_array().unwrap();
        rows.iter()
            .find(|row| row["token_id"] == json!(id))
            .unwrap()
            .clone()
    };
    let ids: Vec<u64> = serde_json::from_value(config["token_indices"].clone()).unwrap();
    let both = ids.iter().filter(|id| [299, 12].contains(*id)).count();
    assert_eq!(table["only_in_a"], json!(ids.len() - both));
    assert_eq!(table["only_in_b"], json!(2 - both));
    assert_eq!(other["equal"], json!(false));
    // The trained row against the base's, computed here.
    let slot = ids.iter().position(|id| *id == 299).unwrap();
    let trained = floats(&read_tensors(&first.join("adapter_model.safetensors"))[DELTA].2);
    let table = floats(&read_tensors(&workspace.model().join("model.safetensors"))[TABLE].2);
    let dim = trained.len() / ids.len();
    let (a, b) = (&trained[slot * dim..][..dim], &table[299 * dim..][..dim]);
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    let apart: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (norm_a, norm_b) = (dot(a, a).sqrt(), dot(b, b).sqrt());
    let row = by_id(299);
    for (field, expected) in [
        ("norm_a", norm_a),
        ("norm_b", norm_b),
        ("cosine", dot(a, b) / (norm_a * norm_b)),
        ("distance", dot(&apart, &apart).sqrt()),
    ] {
        let found = row[field].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-6, "{field}: {found} and {expected}");
    }
    assert_eq!((&row["in"], &row["token"]), (&json!("both"), &json!("<answer>")));
    let text = run(&args!["diff", first, second]).ok();
    for part in ["model.embed_tokens: ", "cosine", "299  \"<answer>\"", "only in A"] {
        assert!(text.stdout.contains(part), "{part}: {text:#?}");
    }
}

/// Numbers that are none are null.
#[test]
fn a_row_of_zeros_has_no_cosine() {
    let workspace = Workspace::new();
    let tuned = workspace.tuned();
    edit_tensors(&tuned.join("model.safetensors"), |tensors| {
        let (_, shape, bytes) = tensors.get_mut(TABLE).unwrap();
        let row_bytes = bytes.len() / shape[0];
        bytes[..row_bytes].fill(0);
        bytes[row_bytes..2 * row_bytes].copy_from_slice(&f32::NAN.to_le_bytes().repeat(row_bytes / 4));
    });
    let diff = run(&args!["diff", "--json", workspace.model(), tuned])
        .ok()
        .json();
    let rows = &diff["tables"][0]["rows"];
    assert_eq!(
        (&rows[0]["norm_b"], &rows[0]["cosine"]),
        (&json!(0.0), &Value::Null)
    );
    assert_eq!(
        (&rows[1]["norm_b"], &rows[1]["distance"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(rows[1]["token_id"], json!(1));
    run(&workspace.command("extract")).ok();
}

#[test]
fn two_of_a_kind_are_compared() {
    let workspace = Workspace::new();
    let (model, adapter) = (workspace.model(), workspace.adapter());
    for (a, b) in [(&model, &adapter), (&adapter, &model)] {
        workspace.refuses(
            &args!["diff", a, b],
            &["/adapter is an adapter", "/model", "two of a kind"],
        );
    }
    workspace.refuses(
        &args!["diff", model, workspace.path("nothing")],
        &["/nothing does not exist"],
    );
    run(&args!["diff", model]).misused(&["required"]);
    run(&args!["diff", model, model, "--limit=-1"]).misused(&["--limit"]);
}

//! `split`: together, the model and the adapter that it writes are what the adapter was.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::json;
use support::{args, checkpoint_tensors, edit_json, fixture, read_json, read_tensors, run, snapshot};

fn split(case: &str, adapter: &Path, home: &Path) -> Vec<OsString> {
    let (model, plain) = (home.join("model"), home.join("plain"));
    args![
        "split",
        "--json",
        "--model",
        fixture(case).join("base"),
        "--adapter",
        adapter,
        "--out-model",
        model,
        "--out-adapter",
        plain
    ]
}

#[test]
fn both_parts_merged_are_the_whole() {
    for case in [
        "lora_list_untied",
        "lora_list_tied",
        "lora_list_gemma2",
        "lora_dict_untied",
    ] {
        let home = tempfile::tempdir().unwrap();
        let (model, plain) = (home.path().join("model"), home.path().join("plain"));
        let base = fixture(case).join("base");
        let adapter = fixture(case).join("adapter");
        let report = run(&split(case, &adapter, home.path())).ok().json();
        let weights = read_tensors(&plain.join("adapter_model.safetensors"));
        assert!(
            weights.keys().all(|name| name.contains(".lora_")),
            "{case}: {:?}",
            weights.keys()
        );
        assert_eq!(report["lora_modules"], json!(weights.len() / 2), "{case}");
        let config = read_json(&plain.join("adapter_config.json"));
        assert_eq!(config["trainable_token_indices"], json!(null));
        assert_eq!(config["base_model_name_or_path"], json!(model));
        run(&args!["verify", "--model", model, "--adapter", plain]).ok();
        // Only rows of tables have changed in the model.
        let diff = run(&args!["diff", "--json", base, model]).ok().json();
        assert_eq!(diff["tensors"], json!([]), "{case}");
        let changed: u64 = diff["tables"]
            .as_array()
            .unwrap()
            .iter()
            .map(|table| table["changed"].as_u64().unwrap())
            .sum();
        // A token that no batch had is as it was.
        let rows = report["rows"].as_u64().unwrap();
        assert!(changed > 0 && changed <= rows, "{case}: {changed} of {rows}");
        let (whole, parts) = (home.path().join("whole"), home.path().join("parts"));
        run(&args![
            "merge",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            whole
        ]);
        run(&args![
            "merge",
            "--model",
            model,
            "--adapter",
            plain,
            "--out",
            parts
        ]);
        assert_eq!(checkpoint_tensors(&whole), checkpoint_tensors(&parts), "{case}");
        // Nothing is replaced but by force.
        let before = snapshot(home.path());
        run(&split(case, &adapter, home.path())).refused(&["already exists", "--force"]);
        assert_eq!(snapshot(home.path()), before);
        let again = [split(case, &adapter, home.path()), args!["--force"]].concat();
        run(&again).ok();
        assert_eq!(snapshot(home.path()), before);
    }
}

#[test]
fn what_cannot_be_split_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let refuse = |case: &str, adapter: &Path, parts: &[&str]| {
        let before = snapshot(home.path());
        run(&split(case, adapter, home.path())).refused(parts);
        assert_eq!(snapshot(home.path()), before);
    };
    let rows = fixture("llama_untied/adapter");
    refuse("llama_untied", &rows, &["no weights of LoRA", "merge"]);
    // Plain already.
    let case = "lora_list_untied";
    run(&split(case, &fixture(case).join("adapter"), home.path())).ok();
    let plain = home.path().join("once");
    fs::rename(home.path().join("plain"), &plain).unwrap();
    fs::remove_dir_all(home.path().join("model")).unwrap();
    refuse(case, &plain, &["trains no tokens"]);
    // An output that would take another with it.
    let adapter = fixture(case).join("adapter");
    let mut args = [split(case, &adapter, home.path()), args!["--force"]].concat();
    let last = args.len() - 2;
    for (out, part) in [
        (home.path().join("model"), "the model to write"),
        (home.path().join("model/inside"), "the model to write"),
        (fixture(case).join("base"), "base"),
    ] {
        args[last] = out.into();
        run(&args).refused(&[part]);
        assert!(!home.path().join("model").exists());
    }
}

/// Weights of LoRA for the embedding would be added to the rows in the model.
#[test]
fn lora_of_the_same_table_is_refused() {
    let case = "lora_list_untied";
    let home = tempfile::tempdir().unwrap();
    let adapter = home.path().join("adapter");
    support::copy_dir(&fixture(case).join("adapter"), &adapter);
    edit_json(&adapter.join("adapter_config.json"), |config| {
        config["target_modules"]
            .as_array_mut()
            .unwrap()
            .push(json!("embed_tokens"));
        config["r"] = json!(1);
        config["rank_pattern"] = json!({});
    });
    support::edit_tensors(&adapter.join("adapter_model.safetensors"), |tensors| {
        let table = &read_tensors(&fixture(case).join("base/model.safetensors"))["model.embed_tokens.weight"];
        let [rows, columns] = table.1[..] else { panic!() };
        tensors.retain(|name, _| !name.contains(".lora_"));
        for (factor, shape) in [("A", [1, rows]), ("B", [columns, 1])] {
            let name = format!("base_model.model.model.embed_tokens.lora_embedding_{factor}");
            let bytes = vec![0; 4 * shape[0] * shape[1]];
            tensors.insert(name, (safetensors::Dtype::F32, shape.to_vec(), bytes));
        }
    });
    run(&split(case, &adapter, home.path())).refused(&["\"model.embed_tokens\"", "LoRA"]);
    assert!(!home.path().join("model").exists() && !home.path().join("plain").exists());
}

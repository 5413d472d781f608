//! Weights of LoRA in encoders, from training to the merged model.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use support::{args, assert_close, copy_dir, edit_tensors, encoder, floats_of, read_json, read_tensors, run};
use tempfile::TempDir;

/// What a command says, with `--json` and more arguments.
fn said(command: &str, args: &[OsString], more: &[&str]) -> Value {
    let mut all = args![command, "--json"];
    all.extend(args.iter().cloned());
    all.extend(more.iter().map(Into::into));
    run(&all).ok().json()
}

/// A tensor that `forward` writes.
fn forward(model: &Path, adapter: Option<&Path>, tensor: &str) -> Vec<f32> {
    let home = TempDir::new().unwrap();
    let (ids, out) = (home.path().join("ids.json"), home.path().join("out.safetensors"));
    fs::write(&ids, "[[2, 77, 9, 40, 3], [4, 12, 12, 6, 8]]").unwrap();
    let mut args = args!["--model", model, "--input-ids", ids, "--out", out];
    args.extend(
        adapter
            .into_iter()
            .flat_map(|adapter| args!["--adapter", adapter]),
    );
    said("forward", &args, &[]);
    floats_of(&read_tensors(&out), tensor)
}

/// Trains, resumes, applies, merges and splits; `tensor` is what `forward` is asked for.
fn all_the_way(model: &Path, lines: &str, [targets, objective, tensor]: [&str; 3], lora_modules: usize) {
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (data, adapter) = (place("data.jsonl"), place("adapter"));
    fs::write(&data, lines.repeat(4)).unwrap();
    let train = |out: &Path, more: &[&str]| {
        let mut args = args!["--model", model, "--data", data, "--out", out];
        let options = format!(
            "--objective {objective} --token-ids 77,12,40 --lora-rank 2 --lora-targets {targets} --batch-size 2 \
             --lr 0.02 --save-every 2"
        );
        args.extend(options.split(' ').map(Into::into));
        said("train", &args, more)
    };
    let summary = train(&adapter, &["--steps", "4"]);
    assert_eq!(summary["lora_modules"], lora_modules, "{summary}");
    assert!(
        summary["gradient_check_error"].as_f64().unwrap() < 0.05,
        "{summary}"
    );
    let config = read_json(&adapter.join("adapter_config.json"));
    assert_eq!(
        (&config["peft_type"], &config["task_type"]),
        (&json!("LORA"), &Value::Null)
    );
    assert_eq!(config["trainable_token_indices"], json!([77, 12, 40]));

    // Cut in two, with activations computed again, it goes on bit for bit.
    let cut = place("cut");
    train(&cut, &["--steps", "2"]);
    train(
        &cut,
        &["--steps", "4", "--recompute", "--resume", cut.to_str().unwrap()],
    );
    let tensors = |dir: &Path| read_tensors(&dir.join("adapter_model.safetensors"));
    assert_eq!(tensors(&cut), tensors(&adapter));

    let (merged, split, plain) = (place("merged"), place("split"), place("plain"));
    said("verify", &args!["--model", model, "--adapter", adapter], &[]);
    said(
        "merge",
        &args!["--model", model, "--adapter", adapter, "--out", merged],
        &[],
    );
    let args = args![
        "--model",
        model,
        "--adapter",
        adapter,
        "--out-model",
        split,
        "--out-adapter",
        plain
    ];
    let report = said("split", &args, &[]);
    assert_eq!(report["lora_modules"], lora_modules, "{report}");
    let base = forward(model, None, tensor);
    let beside = forward(model, Some(&adapter), tensor);
    let moved = base
        .iter()
        .zip(&beside)
        .fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(moved > 1e-2, "{moved}");
    assert_close("merged", &forward(&merged, None, tensor), &beside, 1e-5, 1e-4);
    assert_close(
        "split",
        &forward(&split, Some(&plain), tensor),
        &beside,
        1e-5,
        1e-5,
    );
    let loss = |model: &Path, adapter: Option<&Path>| {
        let mut args = args!["--data", data, "--objective", objective, "--model", model];
        args.extend(
            adapter
                .into_iter()
                .flat_map(|adapter| args!["--adapter", adapter]),
        );
        said("eval", &args, &[])["loss"].as_f64().unwrap()
    };
    let [before, beside, baked] = [
        loss(model, None),
        loss(model, Some(&adapter)),
        loss(&merged, None),
    ];
    assert!(
        beside < before && (beside - baked).abs() < 1e-5,
        "{before} {beside} {baked}"
    );
}

/// As checkpoints of BERT mostly do, this one has a pooler, which a masked language model has not.
#[test]
fn a_masked_language_model() {
    let home = TempDir::new().unwrap();
    let model = home.path().join("model");
    copy_dir(&encoder("bert"), &model);
    edit_tensors(&model.join("model.safetensors"), |tensors| {
        let zeros = |shape: &[usize]| vec![0; 4 * shape.iter().product::<usize>()];
        for (name, shape) in [("weight", vec![24, 24]), ("bias", vec![24])] {
            let tensor = (Dtype::F32, shape.clone(), zeros(&shape));
            tensors.insert(format!("bert.pooler.dense.{name}"), tensor);
        }
    });
    let line = |ids: [u32; 5], labels: [i64; 5]| format!("{}\n", json!({"input_ids": ids, "labels": labels}));
    let lines =
        line([2, 77, 9, 3, 5], [-100, 77, -100, 6, 7]) + &line([12, 8, 40, 11, 6], [5, -100, 40, -100, 9]);
    all_the_way(&model, &lines, ["query,dense", "masked", "logits"], 2 * 4 + 1);
}

#[test]
fn an_encoder_of_sentences() {
    let line = |ids: [u32; 5], definition: [u32; 3]| {
        format!("{}\n", json!({"input_ids": ids, "definition_ids": definition}))
    };
    let lines = line([2, 77, 9, 3, 5], [5, 6, 7]) + &line([12, 8, 40, 11, 6], [30, 31, 32]);
    let what = ["all-linear", "teach", "sentence_embeddings"];
    all_the_way(&encoder("sentences"), &lines, what, 2 * 6);
}

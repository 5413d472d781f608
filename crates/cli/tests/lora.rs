//! Adapters with weights of LoRA, and several adapters in one directory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(unix)] // limits of memory

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;
use support::{
    Case, PROGRAM, Run, Tensors, args, assert_close, checkpoint_tensors, copy_dir, edit_json, eval, fixture,
    floats_of, loss, read_json, read_tensors, run, write_tensors,
};

const CASES: [&str; 4] = [
    "lora_list_untied",
    "lora_list_tied",
    "lora_dict_untied",
    "lora_dict_tied_same",
];
const Q: &str = "model.layers.0.self_attn.q_proj";

/// The merged model computes what PEFT's does: merging and what is merged are right in every tensor.
#[test]
fn merged_models_compute_what_those_of_peft_do() {
    let home = tempfile::tempdir().unwrap();
    for name in CASES {
        let case = Case::open(name);
        let (base, adapter) = (case.dir.join("base"), case.dir.join("adapter"));
        let merged = home.path().join(name);
        let report = run(&args![
            "merge",
            "--json",
            "--safe",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            merged
        ])
        .ok();
        assert_eq!(report.json()["lora_modules"], 4, "{name}");
        let ids = home.path().join("ids.json");
        fs::write(&ids, json!(case.integers("probe.input_ids")).to_string()).unwrap();
        let out = home.path().join("forward.safetensors");
        run(&args![
            "forward",
            "--force",
            "--model",
            merged,
            "--input-ids",
            ids,
            "--out",
            out
        ])
        .ok();
        let ours = floats_of(&read_tensors(&out), "logits");
        let theirs = case.floats("logits.merged");
        assert_close(name, &ours, &theirs, 1e-4, 1e-4);
    }
}

#[test]
fn verify_and_inspect_tell_what_an_adapter_holds() {
    for name in CASES {
        let dir = fixture(name);
        let (base, adapter) = (dir.join("base"), dir.join("adapter"));
        let report = run(&args!["verify", "--json", "--model", base, "--adapter", adapter])
            .ok()
            .json();
        assert_eq!(report["fits"], true, "{report}");
        let checks = report["checks"].as_array().unwrap();
        let lora = checks
            .iter()
            .find(|check| check["check"] == "weights of LoRA")
            .unwrap();
        assert_eq!(
            (&lora["ok"], &lora["detail"]),
            (&json!(true), &json!("4 modules, rank 4")),
            "{report}"
        );
        let report = run(&args!["inspect", "--json", adapter, "--model", base])
            .ok()
            .json();
        assert_eq!(report["peft_type"], "LORA");
        assert_eq!(report["extra_tensors"], json!([]));
        let lora = &report["lora"][0];
        assert_eq!(
            (&lora["module"], &lora["rank"], &lora["scaling"]),
            (&json!(Q), &json!(4), &json!(2.0)),
            "{report}"
        );
        let text = run(&args!["inspect", adapter]).ok().stdout;
        assert!(text.contains(&format!("LoRA {Q}: rank 4, scaling 2")), "{text}");
    }
}

#[test]
fn an_adapter_that_cannot_be_merged_is_named_and_nothing_is_written() {
    let home = tempfile::tempdir().unwrap();
    let base = fixture("lora_list_untied/base");
    let (adapter, out) = (home.path().join("adapter"), home.path().join("out"));
    let (config, file) = (
        adapter.join("adapter_config.json"),
        adapter.join("adapter_model.safetensors"),
    );
    let factor = format!("base_model.model.{Q}.lora_A.weight");
    let restore = || {
        let _ = fs::remove_dir_all(&adapter);
        copy_dir(&fixture("lora_list_untied/adapter"), &adapter);
    };
    let refuse = |parts: &[&str]| {
        run(&args![
            "merge",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            out
        ])
        .refused(parts);
        assert!(!out.exists());
        let verified = run(&args!["verify", "--json", "--model", base, "--adapter", adapter]);
        verified.failed(parts);
        assert_eq!(verified.json()["fits"], false, "{verified:#?}");
        run(&args!["inspect", "--json", adapter, "--model", base]).refused(parts);
        let shown = run(&args!["inspect", "--json", adapter]).ok().json();
        assert_eq!(shown["kind"], "adapter");
    };
    for (field, value) in [
        ("use_dora", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
    ] {
        restore();
        edit_json(&config, |fields| fields[field] = value);
        refuse(&["adapter_config.json", field]);
    }
    restore();
    edit_json(&config, |fields| fields["r"] = json!(3));
    refuse(&[&factor, "r = 3", "[4, 32]"]);
    restore();
    support::edit_tensors(&file, |tensors| {
        tensors.remove(&factor);
    });
    refuse(&[&factor, "there is no tensor"]);
    restore();
    support::edit_tensors(&file, |tensors| {
        tensors.retain(|name, _| !name.contains(Q));
    });
    refuse(&[&factor, "exclude_modules"]);
    restore();
    support::edit_tensors(&file, |tensors| {
        let (dtype, shape, bytes) = tensors[&factor].clone();
        tensors.insert(
            format!("base_model.model.{Q}.lora_magnitude_vector"),
            (dtype, shape, bytes),
        );
    });
    refuse(&["lora_magnitude_vector", "DoRA"]);
}

/// An adapter beside a model: its rows, its rows of the head and its weights of LoRA count, and none without the others.
#[test]
fn adapters_beside_a_model() {
    let home = tempfile::tempdir().unwrap();
    let ids = home.path().join("ids.json");
    let out = home.path().join("forward.safetensors");
    let forward = |base: &Path, adapter: &Path| {
        run(&args![
            "forward",
            "--force",
            "--model",
            base,
            "--adapter",
            adapter,
            "--input-ids",
            ids,
            "--out",
            out
        ])
    };
    for name in CASES {
        let case = Case::open(name);
        fs::write(&ids, json!(case.integers("probe.input_ids")).to_string()).unwrap();
        forward(&case.dir.join("base"), &case.dir.join("adapter")).ok();
        let ours = floats_of(&read_tensors(&out), "logits");
        assert_close(name, &ours, &case.floats("logits.trained"), 1e-4, 1e-4);
    }
    fs::remove_file(&out).unwrap();
    let base = fixture("lora_dict_untied/base");
    let without_weights = home.path().join("rows");
    copy_dir(&fixture("lora_dict_untied/adapter"), &without_weights);
    support::edit_tensors(&without_weights.join("adapter_model.safetensors"), |tensors| {
        tensors.retain(|name, _| name.contains("trainable_tokens_delta"));
    });
    forward(&base, &without_weights).refused(&["lora_A", Q, "target_modules"]);
    let data = home.path().join("data.jsonl");
    fs::write(&data, "{\"input_ids\": [1, 2, 3]}\n").unwrap();
    run(&args![
        "eval",
        "--model",
        base,
        "--adapter",
        without_weights,
        "--data",
        data
    ])
    .refused(&["lora_A", Q]);
    assert!(!out.exists());
}

/// Rows and weights of LoRA train together; the adapter is PEFT's, applies, resumes bit for bit, and merges.
#[test]
fn training_beside_rows() {
    let home = tempfile::tempdir().unwrap();
    let base = fixture("llama_untied/base");
    let data = home.path().join("data.jsonl");
    fs::write(
        &data,
        "{\"input_ids\": [1, 40, 7, 149, 9]}\n{\"input_ids\": [149, 12, 40, 5, 8]}\n".repeat(3),
    )
    .unwrap();
    let train = |out: &Path, [alpha, targets]: [&str; 2], more: &[&str]| {
        let mut args = args![
            "train",
            "--json",
            "--model",
            base,
            "--data",
            data,
            "--token-ids",
            "149,40",
            "--out",
            out,
            "--batch-size",
            "2",
            "--lr",
            "0.02",
            "--lora-rank",
            "2",
            "--lora-alpha",
            alpha,
            "--lora-targets",
            targets,
            "--seed",
            "3"
        ];
        args.extend(more.iter().map(Into::into));
        run(&args)
    };
    let usual = ["4", "q_proj,down_proj"];
    let whole = home.path().join("whole");
    let report = train(&whole, usual, &[]).ok();
    assert_eq!(report.json()["lora_modules"], 4);
    // Two rows; in each of two layers A and B of q_proj and down_proj.
    let (hidden, inner, rank) = (48, 80, 2);
    let factors = 2 * rank * ((hidden + hidden) + (inner + hidden));
    assert_eq!(report.json()["parameters_trained"], 2 * hidden + factors);
    assert!(report.json()["gradient_check_error"].as_f64().unwrap() < 0.1);
    let saved = read_json(&whole.join("adapter_config.json"));
    assert_eq!(saved["peft_type"], "LORA");
    assert_eq!(saved["trainable_token_indices"], json!([149, 40]));
    assert_eq!(saved["target_modules"], json!(["q_proj", "down_proj"]));
    assert_eq!((&saved["r"], &saved["lora_alpha"]), (&json!(2), &json!(4)));
    let tensors = read_tensors(&whole.join("adapter_model.safetensors"));
    let moved = floats_of(&tensors, &format!("base_model.model.{Q}.lora_B.weight"));
    assert!(moved.iter().any(|value| *value != 0.0), "B has not trained");

    // Cut in two, it goes on bit for bit.
    let cut = home.path().join("cut");
    train(&cut, usual, &["--steps", "2", "--save-every", "1"]).ok();
    train(
        &cut,
        usual,
        &[
            "--steps",
            "3",
            "--save-every",
            "1",
            "--resume",
            cut.to_str().unwrap(),
        ],
    )
    .ok();
    let resumed = read_tensors(&cut.join("adapter_model.safetensors"));
    for (name, (_, _, bytes)) in &tensors {
        assert_eq!(bytes, &resumed[name].2, "{name}");
    }
    train(&cut, ["8", usual[1]], &["--resume", cut.to_str().unwrap()]).refused(&["scales", Q, "by 2, not 4"]);
    train(&cut, ["4", "q_proj"], &["--resume", cut.to_str().unwrap()])
        .refused(&["other trained weights", "down_proj"]);

    // With the adapter beside it, or merged into it, the model computes the same.
    let merged = home.path().join("merged");
    run(&args![
        "merge",
        "--model",
        base,
        "--adapter",
        whole,
        "--out",
        merged
    ])
    .ok();
    let loss_of = |model: &Path, adapter: Option<&Path>| loss(&eval(model, adapter, &data, &[]));
    let (beside, inside) = (loss_of(&base, Some(&whole)), loss_of(&merged, None));
    assert!((beside - inside).abs() < 1e-5, "{beside} {inside}");
    assert!(beside < loss_of(&base, None) - 0.1);
    run(&args!["verify", "--model", base, "--adapter", whole]).ok();
    train(&home.path().join("other"), ["4", "nothing"], &[]).refused(&["'nothing'", "q_proj"]);
}

#[test]
fn several_adapters_of_one_directory() {
    let dir = fixture("multi_lora_mixed_batch");
    let (base, all) = (dir.join("base"), dir.join("adapter"));
    let report = run(&args!["inspect", "--json", all, "--model", base]).ok().json();
    assert_eq!(report["kind"], "adapters");
    let names: Vec<_> = report["adapters"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(names, ["first", "second"]);
    assert_eq!(
        report["adapters"]["second"]["modules"][0]["shape"],
        json!([3, 32])
    );
    let report = run(&args!["verify", "--json", "--model", base, "--adapter", all])
        .ok()
        .json();
    assert_eq!(report["fits"], true);
    let checks = |name: &str| {
        report["checks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|check| check["adapter"] == name)
            .count()
    };
    assert_eq!((checks("first"), checks("second")), (6, 6), "{report}");

    let home = tempfile::tempdir().unwrap();
    let broken = home.path().join("several");
    for name in ["first", "second"] {
        copy_dir(&all.join(name), &broken.join(name));
    }
    copy_dir(&all.join("first"), &broken);
    edit_json(&broken.join("second/adapter_config.json"), |fields| {
        fields["use_dora"] = json!(true);
    });
    let verified = run(&args!["verify", "--json", "--model", base, "--adapter", broken]);
    verified.failed(&["\"second\" of", "use_dora"]);
    assert_eq!(verified.json()["checks"][0]["adapter"], "default");
}

#[test]
fn tokens_of_several_adapters_are_refused_or_mixed_as_asked() {
    let dir = fixture("multi_lora_mixed_batch");
    let (base, first, second) = (
        dir.join("base"),
        dir.join("adapter/first"),
        dir.join("adapter/second"),
    );
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let merge = |more: &[&str]| {
        let args = args![
            "merge",
            "--json",
            "--force",
            "--model",
            base,
            "--adapter",
            first,
            second,
            "--out",
            out
        ];
        run(&[args, more.iter().map(OsString::from).collect()].concat())
    };
    merge(&[]).refused(&["token id 5", "first", "second"]);
    merge(&["--overlap=error"]).refused(&["token id 5"]);
    merge(&["--weights=1,2"]).refused(&["--weights", "--overlap mean"]);
    merge(&["--overlap=mean", "--weights=1"]).refused(&["weights of the adapters"]);
    merge(&["--overlap=mean", "--weights=1,0"]).refused(&["weight of an adapter"]);
    merge(&["--overlap=first"]).misused(&["--overlap", "first"]);
    assert!(!out.exists());

    let row = |tensors: &Tensors, name: &str, row: usize| {
        floats_of(tensors, name)[row * 32..(row + 1) * 32].to_vec()
    };
    let delta = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    // Token 5 is the second of the first adapter and the first of the other.
    let [a, b] = [(&first, 1), (&second, 0)]
        .map(|(dir, at)| row(&read_tensors(&dir.join("adapter_model.safetensors")), delta, at));
    let merged = |more: &[&str]| {
        let report = merge(more).ok().json();
        assert_eq!(
            (&report["rows"], &report["lora_modules"]),
            (&json!(4), &json!(4)),
            "{report}"
        );
        row(&checkpoint_tensors(&out), "model.embed_tokens.weight", 5)
    };
    let mix = |weights: [f32; 2]| {
        a.iter()
            .zip(&b)
            .map(|(a, b)| weights[0] * a + weights[1] * b)
            .collect::<Vec<_>>()
    };
    assert_close("last", &merged(&["--overlap=last"]), &b, 0.0, 0.0);
    assert_close("mean", &merged(&["--overlap=mean"]), &mix([0.5, 0.5]), 0.0, 0.0);
    assert_close(
        "weights",
        &merged(&["--overlap=mean", "--weights=3,1"]),
        &mix([0.75, 0.25]),
        0.0,
        0.0,
    );
}

/// A weight of 64 MiB is merged where the program may have 24 MiB of memory of its own; mapped files do not count.
#[cfg(target_os = "linux")]
#[test]
fn large_weights_are_merged_piece_by_piece() {
    let (rows, columns) = (4096usize, 8192usize);
    let home = tempfile::tempdir().unwrap();
    let (base, adapter, out) = (
        home.path().join("base"),
        home.path().join("adapter"),
        home.path().join("out"),
    );
    fs::create_dir_all(&base).unwrap();
    fs::create_dir_all(&adapter).unwrap();
    fs::write(base.join("config.json"), "{}").unwrap();
    let weight = (Dtype::BF16, vec![rows, columns], vec![0; rows * columns * 2]);
    write_tensors(
        &base.join("model.safetensors"),
        &Tensors::from([("l.weight".to_owned(), weight)]),
    );
    fs::copy(
        fixture("lora_list_untied/adapter/adapter_config.json"),
        adapter.join("adapter_config.json"),
    )
    .unwrap();
    edit_json(&adapter.join("adapter_config.json"), |fields| {
        fields["r"] = json!(1);
        fields["trainable_token_indices"] = json!(null);
        fields["target_modules"] = json!(["l"]);
    });
    let ones = |shape: [usize; 2]| {
        (
            Dtype::F32,
            shape.to_vec(),
            1f32.to_le_bytes().repeat(shape[0] * shape[1]),
        )
    };
    let factors = Tensors::from([
        ("base_model.model.l.lora_A.weight".to_owned(), ones([1, columns])),
        ("base_model.model.l.lora_B.weight".to_owned(), ones([rows, 1])),
    ]);
    write_tensors(&adapter.join("adapter_model.safetensors"), &factors);
    let args = args![
        "merge",
        "--json",
        "--model",
        base,
        "--adapter",
        adapter,
        "--out",
        out
    ];
    let script = "ulimit -d 24576; exec \"$0\" \"$@\"";
    let mut command = assert_cmd::Command::new("bash");
    command.arg("-c").arg(script).arg(PROGRAM).args(&args);
    Run::of(&args, &command.output().unwrap()).ok();
    let merged = checkpoint_tensors(&out);
    // alpha 8 over rank 1.
    assert!(
        merged["l.weight"]
            .2
            .chunks_exact(2)
            .all(|value| value == [0x00, 0x41])
    );
}

//! Adapters with weights of LoRA, and several adapters in one directory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(unix)] // limits of memory

mod support;

use std::fs;

use safetensors::Dtype;
use serde_json::json;
use support::{
    Case, PROGRAM, Run, Tensors, args, assert_close, checkpoint_tensors, copy_dir, edit_json, fixture,
    floats_of, read_tensors, run, write_tensors,
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

/// Rows without the weights that they were trained with are another model.
#[test]
fn rows_of_an_adapter_are_not_used_without_its_other_parts() {
    let home = tempfile::tempdir().unwrap();
    let ids = home.path().join("ids.json");
    fs::write(&ids, "[[1, 2, 3]]").unwrap();
    let data = home.path().join("data.jsonl");
    fs::write(&data, "{\"input_ids\": [1, 2, 3]}\n").unwrap();
    let out = home.path().join("out");
    let dir = fixture("lora_list_untied");
    let (base, adapter) = (dir.join("base"), dir.join("adapter"));
    let without_weights = home.path().join("rows");
    copy_dir(&fixture("lora_dict_untied/adapter"), &without_weights);
    support::edit_tensors(&without_weights.join("adapter_model.safetensors"), |tensors| {
        tensors.retain(|name, _| name.contains("trainable_tokens_delta"));
    });
    for (adapter, parts) in [
        (&adapter, ["weights of LoRA", Q]),
        (&without_weights, ["lm_head", "table of its own"]),
    ] {
        for args in [
            args![
                "forward",
                "--model",
                base,
                "--adapter",
                adapter,
                "--input-ids",
                ids,
                "--out",
                out
            ],
            args!["eval", "--model", base, "--adapter", adapter, "--data", data],
        ] {
            run(&args).refused(&[&parts[..], &["merge"]].concat());
            assert!(!out.exists());
        }
    }
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
        run(&[args, more.iter().map(std::ffi::OsString::from).collect()].concat())
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

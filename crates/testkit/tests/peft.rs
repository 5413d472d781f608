//! The runner of PEFT's cases finds what is wrong: every damaged case fails, with the reason.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "../../../backends/ndarray/tests/support/harness.rs"]
mod harness;

use std::path::Path;

use harness::Nd;
use serde_json::{Value, json};
use tempfile::TempDir;
use trainable_tokens_testkit::peft::{fixtures, run_case};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, name) = (
            entry.as_ref().unwrap().path(),
            entry.as_ref().unwrap().file_name(),
        );
        if from.is_dir() {
            copy(&from, &to.join(name));
        } else {
            std::fs::write(to.join(name), std::fs::read(from).unwrap()).unwrap();
        }
    }
}

/// A copy of a case, with its `case.json` changed.
fn changed(case: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures().join(case), dir.path());
    let path = dir.path().join("case.json");
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
    dir
}

/// Where the recorded tensor `name` lies in its file.
fn bytes_of<'a>(file: &'a mut [u8], name: &str) -> &'a mut [u8] {
    let header = usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
    let json: Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let [start, end] = [0, 1].map(|at| json[name]["data_offsets"][at].as_u64().unwrap());
    let [start, end] = [start, end].map(|at| 8 + header + usize::try_from(at).unwrap());
    &mut file[start..end]
}

/// A copy of a case whose recorded `f32` tensor `name` has one value shifted, or its last bit flipped.
fn shifted(case: &str, name: &str, at: usize, by: Option<f32>) -> TempDir {
    let dir = changed(case, |_| ());
    let path = dir.path().join("expected.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let value = &mut bytes_of(&mut file, name)[at * 4..][..4];
    match by {
        Some(by) => {
            let shifted = f32::from_le_bytes((&*value).try_into().unwrap()) + by;
            value.copy_from_slice(&shifted.to_le_bytes());
        }
        None => value[0] ^= 1,
    }
    std::fs::write(path, file).unwrap();
    dir
}

#[track_caller]
fn fails(dir: &TempDir, reasons: &[&str]) {
    let failure = run_case::<Nd<f32>, Nd<half::bf16>>(dir.path()).unwrap_err();
    for reason in reasons {
        assert!(failure.contains(reason), "{failure:?} without {reason:?}");
    }
}

#[test]
fn another_value_is_found_and_named() {
    for (name, at, by, reasons) in [
        ("embed.noop", 13, None, ["embed_forward noop", "row 1, column 5"]),
        (
            "embed.trained",
            8,
            None,
            ["embed_forward adapter", "row 1, column 0"],
        ),
        (
            "embed.merged",
            8,
            None,
            ["embed_forward merged", "row 1, column 0"],
        ),
        ("embed.base", 0, None, ["embed.base", "row 0, column 0"]),
        (
            "merged.weight",
            8,
            None,
            ["merge merged.weight: table", "row 1, column 0"],
        ),
        (
            "unmerged.weight",
            8,
            None,
            ["unmerge unmerged.weight: table", "row 1, column 0"],
        ),
        ("base.weight", 0, None, ["base.weight", "row 0, column 0"]),
        (
            "delta.trained",
            1,
            None,
            ["adapters: adapter: rows", "row 0, column 1"],
        ),
        (
            "delta.grad",
            9,
            Some(1e-5),
            ["delta_grad delta.grad: gradient", "row 1, column 1"],
        ),
        (
            "traj.adamw.grads",
            7 * 40,
            Some(1e-3),
            ["trajectory adamw: gradient of step 7", "row 0, column 0"],
        ),
        (
            "traj.adamw.deltas",
            9 * 40 + 2,
            Some(1e-5),
            ["trajectory adamw: rows after step 8", "row 0, column 2"],
        ),
        (
            "traj.mse_sgd.deltas",
            39,
            Some(1e-5),
            [
                "trajectory mse_sgd: rows before the first step",
                "row 4, column 7",
            ],
        ),
        (
            "traj.mse_target",
            0,
            Some(1.0),
            ["trajectory mse_adamw: loss of step 0", "expected"],
        ),
    ] {
        fails(&shifted("standalone_f32", name, at, by), &reasons);
    }
}

#[test]
fn the_optimizer_alone_is_checked() {
    // Neither the frameworks' gradients nor the rows after them can be told from PEFT's at this tolerance.
    let dir = changed("standalone_f32", |json| {
        let operations = json["operations"].as_array_mut().unwrap();
        operations
            .retain(|operation| operation["op"] == "embed_forward" || operation["name"] == "sgd_momentum");
        let trajectory = operations.iter_mut().find(|it| it["op"] == "trajectory").unwrap();
        trajectory["atol"] = json!(1.0);
        trajectory["optimizer"]["momentum"] = json!(0.899);
    });
    fails(
        &dir,
        &["trajectory sgd_momentum: the optimizer alone, rows after step 1"],
    );
}

#[test]
fn every_setting_of_an_optimizer_counts() {
    for (name, setting, value) in [
        ("sgd", "lr", json!(0.11)),
        ("sgd_dampening", "dampening", json!(0.31)),
        ("sgd_nesterov_wd", "nesterov", json!(false)),
        ("sgd_nesterov_wd", "weight_decay", json!(0.11)),
        ("adam_l2", "weight_decay", json!(0.0)),
        ("adam_l2", "type", json!("AdamW")),
        ("adam_amsgrad", "amsgrad", json!(false)),
        ("adamw", "weight_decay", json!(0.0)),
        ("adamw_wd_custom", "betas", json!([0.8, 0.96])),
        ("adamw_wd_custom", "betas", json!([0.81, 0.95])),
        ("adamw_wd_custom", "eps", json!(1e-3)),
        ("adamw_wd0", "weight_decay", json!(0.01)),
    ] {
        let dir = changed("standalone_f32", |json| {
            let operations = json["operations"].as_array_mut().unwrap();
            let operation = operations.iter_mut().find(|it| it["name"] == name).unwrap();
            operation["optimizer"][setting] = value;
        });
        fails(&dir, &[&format!("trajectory {name}: rows after step")]);
    }
}

#[test]
fn every_option_of_the_module_counts() {
    for (case, option, reason) in [
        (
            "variant_padding_idx",
            "padding_idx",
            "delta_grad delta.grad: gradient",
        ),
        (
            "variant_scale_grad_by_freq",
            "scale_grad_by_freq",
            "delta_grad delta.grad: gradient",
        ),
        (
            "variant_max_norm",
            "max_norm",
            "embed_forward adapter embed.trained: output",
        ),
    ] {
        let dir = changed(case, |json| {
            json["modules"][0]
                .as_object_mut()
                .unwrap()
                .remove(option)
                .unwrap();
        });
        fails(&dir, &[reason]);
    }
}

#[test]
fn what_is_unknown_fails() {
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 7] = [
        (
            |json| json["operations"][1]["op"] = json!("transpose"),
            "transpose delta.grad: the operation is unknown",
        ),
        (
            |json| json["operations"][0]["state"] = json!("folded"),
            "the state folded is unknown",
        ),
        (
            |json| json["operations"][2]["loss"] = json!("max(emb)"),
            "the loss max(emb) is unknown",
        ),
        (
            |json| json["operations"][2]["optimizer"]["type"] = json!("Lion"),
            "the optimizer Lion is unknown",
        ),
        (
            |json| json["operations"][2]["optimizer"]["maximize"] = json!(true),
            "the setting maximize",
        ),
        (
            |json| json["modules"][0]["norm_type"] = json!(1.0),
            "the option norm_type of the module is unknown",
        ),
        (
            |json| json["operations"][0]["atol"] = Value::Null,
            "atol is null, expected a number",
        ),
    ];
    for (change, reason) in changes {
        fails(&changed("standalone_f32", change), &[reason]);
    }
}

#[test]
fn a_case_that_checks_nothing_fails() {
    let dir = changed("variant_k1", |json| json["operations"] = json!([]));
    fails(&dir, &["it checks nothing"]);
}

#[test]
fn a_narrower_harness_is_refused() {
    let reason = run_case::<Nd<half::bf16>, Nd<half::bf16>>(&fixtures().join("variant_k1")).unwrap_err();
    assert_eq!(
        reason,
        "PEFT's variant_k1: its table of type F32 needs a harness of that type or a wider one, not BF16"
    );
}

/// The case, the recorded tensor, what its first value is shifted by (or its last bit), and where it shows.
const DAMAGED: [(&str, &str, Option<f32>, &str); 26] = [
    (
        "lora_list_untied",
        "merged.model.layers.0.self_attn.q_proj",
        Some(1e-4),
        "lora_merge merged.model.layers.0.self_attn.q_proj: weight",
    ),
    (
        "multi_standalone",
        "embed.first+second",
        None,
        "embed.first+second: output",
    ),
    (
        "multi_standalone",
        "embed.disabled",
        None,
        "embed.disabled: output",
    ),
    (
        "multi_standalone",
        "embed.merged.first",
        None,
        "embed.merged.first: output",
    ),
    (
        "multi_standalone",
        "grad.first+second.second",
        Some(1e-3),
        "delta_grad: gradient",
    ),
    (
        "multi_standalone",
        "merged.first+second",
        None,
        "merge merged.first+second: table",
    ),
    ("multi_standalone", "unmerged", None, "unmerge unmerged: table"),
    (
        "multi_lora_mixed_batch",
        "embed.mixed",
        None,
        "mixed_batch: output",
    ),
    ("merge_nan_f32", "merged.fine", None, "merge merged.fine: table"),
    ("init_weights_false", "delta.init", None, "roundtrip: rows"),
    ("init_weights_false", "unmerged", None, "unmerge unmerged: table"),
    (
        "target_list_fullpath",
        "embed.pos.table",
        None,
        "embed.pos.table: output",
    ),
    (
        "target_list_two",
        "merged.emb_image",
        None,
        "merge merged.emb_image: table",
    ),
    (
        "llama_untied",
        "deltas",
        None,
        "train: rows before the first step",
    ),
    ("llama_untied", "delta.grads", Some(0.1), "train: rows after step"),
    (
        "gemma2_tied",
        "embed.trained_bf16",
        None,
        "embed.trained_bf16: output",
    ),
    ("bart_tied", "embed.noop_bf16", None, "embed.noop_bf16: output"),
    ("bart_tied", "embed.base_bf16", None, "embed.base_bf16: output"),
    (
        "lora_dict_untied",
        "merged.lm_head",
        None,
        "merge merged.lm_head: table",
    ),
    (
        "lora_dict_tied_different",
        "merged.model.embed_tokens",
        None,
        "the table with the rows of all modules",
    ),
    (
        "resized_vocab",
        "base_resized.embed",
        None,
        "resized vocabulary: the resized table",
    ),
    (
        "resized_vocab_tied",
        "merged.embed",
        None,
        "merge merged.embed: table",
    ),
    (
        "tied_key_variants",
        "delta.trained",
        None,
        "adapters: adapter: rows",
    ),
    (
        "variant_max_norm",
        "base.after_forward",
        None,
        "after the forward pass: the table",
    ),
    (
        "variant_max_norm",
        "delta.after_forward",
        None,
        "after the forward pass: the rows",
    ),
    (
        "standalone_f32",
        "traj.adam.losses",
        Some(0.01),
        "trajectory adam: loss of step 0",
    ),
];

#[test]
fn another_value_of_any_kind_of_case_is_found() {
    for (case, name, by, reason) in DAMAGED {
        fails(&shifted(case, name, 0, by), &[reason]);
    }
    let name = "init.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default";
    fails(
        &shifted("lora_list_tied", name, 0, None),
        &["train: the first rows"],
    );
}

#[test]
fn another_outcome_is_found() {
    type Change = fn(&mut Value);
    let changes: [(&str, Change, &str); 15] = [
        (
            "standalone_f32",
            |json| json["deviation"] = json!(1),
            "the field deviation of case.json is unknown",
        ),
        (
            "multi_standalone",
            |json| json["operations"][0]["scale"] = json!(2),
            "the field scale of the operation is unknown",
        ),
        (
            "multi_standalone",
            |json| drop(json["operations"].as_array_mut().unwrap().remove(2)),
            r#"nothing checks ["embed.third"]"#,
        ),
        (
            "multi_standalone",
            |json| json["operations"][5]["active"] = json!(["first", "second"]),
            "activating is accepted, expected an error of kind Overlap",
        ),
        (
            "multi_standalone",
            |json| json["operations"][8]["peft"]["status"] = json!("ok"),
            "PEFT's outcome",
        ),
        (
            "merge_nan_f32",
            |json| json["operations"][0]["peft"]["status"] = json!("ok"),
            "PEFT's refusal is false, expected true",
        ),
        (
            "tied_key_variants",
            |json| json["variants"]["disagree_head"]["delta_loaded"] = json!("trained"),
            "what PEFT loads of disagree_head",
        ),
        (
            "tied_key_variants",
            |json| json["variants"]["mirrored"] = json["variants"]["both"].clone(),
            "mirrored",
        ),
        (
            "target_suffix_list",
            |json| json["matched_modules"] = json!(["enc.emb"]),
            "matched_modules: modules of the file",
        ),
        (
            "target_regex",
            |json| json["target_modules_given"] = json!(r".*emb|pos\..*"),
            "matched_modules: targeted modules",
        ),
        (
            "target_none_nested",
            |json| json["target_modules_given"] = json!("model.embed_tokens"),
            "expected that there is none",
        ),
        (
            "lora_dict_tied_different_ensure",
            |json| json["trainable_token_indices"]["lm_head"] = json!([149, 3, 40]),
            "different tokens of tied modules are accepted",
        ),
        (
            "t5_tied",
            |json| json["wrapped_modules"]["lm_head"]["tied"] = json!(false),
            "wrapped_modules: targeted modules",
        ),
        (
            "bert_mlm",
            |json| json["merged_checkpoint"]["changed_tensors"] = json!([]),
            "merged_checkpoint: changed tensors",
        ),
        (
            "resized_vocab",
            |json| json["adapters"][0]["load_not_resized"]["status"] = json!("ok"),
            "PEFT's outcome on the base as it was",
        ),
    ];
    for (case, change, reason) in changes {
        fails(&changed(case, change), &[reason]);
    }
}

#[test]
fn another_file_is_found() {
    let dir = changed("llama_tied", |_| ());
    let path = dir.path().join("merged/model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    bytes_of(&mut file, "model.norm.weight")[0] ^= 1;
    std::fs::write(path, file).unwrap();
    fails(&dir, &["merged_checkpoint: tensor model.norm.weight differs"]);

    let dir = changed("llama_tied", |json| {
        json["adapters"][0]["adapter_config"]["inference_mode"] = json!(false);
    });
    fails(&dir, &["adapters: adapter: adapter_config.json"]);
}

//! Adapters of a vocabulary that is larger than the model's.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;

use serde_json::json;
use support::{Case, args, assert_close, floats_of, read_tensors, run};

/// PEFT fails on the model as it was ("index 112 is out of bounds for dimension 0 with size 110"). Here the table that the
/// adapter holds takes the place of the smaller one, in the lookup and in the head that is tied to it.
#[test]
fn a_grown_adapter_runs_on_the_model_as_it_was() {
    let case = Case::open("resized_vocab_tied");
    let home = tempfile::tempdir().unwrap();
    let (ids, out) = (home.path().join("ids.json"), home.path().join("out.safetensors"));
    fs::write(&ids, json!(case.integers("input_ids")).to_string()).unwrap();
    for (base, adapter) in [
        ("base", "adapter"),
        ("base", "adapter_true"),
        ("base_resized", "adapter_false"),
    ] {
        run(&args![
            "forward",
            "--force",
            "--model",
            case.dir.join(base),
            "--adapter",
            case.dir.join(adapter),
            "--input-ids",
            ids,
            "--out",
            out
        ])
        .ok();
        let ours = floats_of(&read_tensors(&out), "logits");
        assert_close(adapter, &ours, &case.floats("logits.trained"), 1e-5, 1e-4);
    }
}

/// What is missing is named: rows of the table where the file has none, and rows of a head of its own.
#[test]
fn what_a_grown_vocabulary_lacks_is_named() {
    let home = tempfile::tempdir().unwrap();
    let (ids, out) = (home.path().join("ids.json"), home.path().join("out.safetensors"));
    fs::write(&ids, "[[1]]").unwrap();
    for (name, adapter, parts) in [
        (
            "resized_vocab",
            "adapter",
            ["lm_head.weight", "tokens 110 to 112"],
        ),
        (
            "resized_vocab_tied",
            "adapter_false",
            ["model.embed_tokens.weight", "110 rows"],
        ),
    ] {
        let case = Case::open(name);
        for command in ["forward", "merge"] {
            let mut args = args![
                command,
                "--model",
                case.dir.join("base"),
                "--adapter",
                case.dir.join(adapter),
                "--out",
                out
            ];
            if command == "forward" {
                args.extend(args!["--input-ids", ids]);
            }
            run(&args).refused(&parts);
            assert!(!out.exists());
        }
    }
}

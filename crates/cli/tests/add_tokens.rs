//! New tokens: in the tokenizer, in the tables, in the config, and ready to train.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{
    Workspace, args, copy_dir, demo, fixture, floats_of, read_json, read_tensors, run, write_tensors,
};

fn add(model: &Path, tokens: &str, out: &Path, more: &[&str]) -> Vec<OsString> {
    let mut args = args![
        "add-tokens",
        "--json",
        "--model",
        model,
        "--tokens",
        tokens,
        "--out",
        out
    ];
    args.extend(more.iter().map(OsString::from));
    args
}

/// The added tokens of a report: string, id, whether the row was there, init.
fn added(report: &Value) -> Vec<(String, u64, bool, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let added = report["added"].as_array().unwrap().iter();
    added
        .map(|token| {
            let (id, reused) = (
                token["id"].as_u64().unwrap(),
                token["reused_row"].as_bool().unwrap(),
            );
            (text(&token["token"]), id, reused, text(&token["init"]))
        })
        .collect()
}

#[test]
fn new_tokens_train_by_their_strings() {
    let workspace = Workspace::new();
    let (model, more) = (workspace.path("grown"), workspace.path("more"));
    let report = run(&add(
        &demo("model"),
        "<aa>,<bb>",
        &model,
        &["--pad-to-multiple-of", "64"],
    ))
    .ok()
    .json();
    let init = "mean-covariance:1e-9+seed:0".to_owned();
    assert_eq!(
        added(&report),
        [
            ("<aa>".to_owned(), 965, false, init.clone()),
            ("<bb>".to_owned(), 966, false, init)
        ]
    );
    assert_eq!(
        [
            &report["vocab_size_before"],
            &report["vocab_size"],
            &report["rows_appended"]
        ],
        [965, 1024, 59]
    );
    assert_eq!(report["tokenizer_files"], json!(["tokenizer.json"]));
    assert_eq!(read_json(&model.join("config.json"))["vocab_size"], 1024);

    // The next tokens take the padded rows, the last of them too.
    let report = run(&add(&model, "<cc>", &more, &["--init", "copy:<aa>"]))
        .ok()
        .json();
    assert_eq!(
        added(&report),
        [("<cc>".to_owned(), 967, true, "copy:965".to_owned())]
    );
    assert_eq!(
        [
            &report["vocab_size_before"],
            &report["vocab_size"],
            &report["rows_appended"]
        ],
        [1024, 1024, 0]
    );
    let shown = run(&args!["inspect", "--json", more]).ok().json();
    assert_eq!(shown["free_rows"].as_array().unwrap().len(), 1024 - 968);

    let data = workspace.path("text.jsonl");
    let text =
        ["the<aa>bird is <bb>", "<cc> the bird", "a <aa> <cc>"].map(|text| json!({"text": text}).to_string());
    fs::write(&data, text.join("\n")).unwrap();
    let summary = run(&args![
        "train",
        "--json",
        "--model",
        more,
        "--data",
        data,
        "--tokens",
        "<cc>,<aa>,<bb>",
        "--steps",
        "3",
        "--lr",
        "0.05",
        "--out",
        workspace.out()
    ])
    .ok()
    .json();
    assert!(
        summary["loss_after"].as_f64() < summary["loss_before"].as_f64(),
        "{summary}"
    );
    let config = read_json(&workspace.out().join("adapter_config.json"));
    assert_eq!(config["token_indices"], json!([967, 965, 966]));
    run(&args!["verify", "--model", more, "--adapter", workspace.out()]).ok();
}

#[test]
fn rows_start_as_asked() {
    let workspace = Workspace::new();
    let table = |model: &Path| {
        let tensors = read_tensors(&model.join("model.safetensors"));
        tensors["model.embed_tokens.weight"].2.clone()
    };
    let row_bytes = 2 * 128;
    let before = table(&demo("model"));
    let resolved = |mode: &str, more: &[&str]| {
        let out = workspace.path("grown");
        let mut flags = vec!["--init", mode, "--seed", "4", "--force"];
        flags.extend(more);
        let report = run(&add(&demo("model"), "<farewell>,<bb>", &out, &flags))
            .ok()
            .json();
        let after = table(&out);
        assert!(after.starts_with(&before), "{mode}: an old row changed");
        assert_eq!(after.len(), before.len() + 2 * row_bytes);
        let rows = [0, 1].map(|at| after[before.len() + at * row_bytes..][..row_bytes].to_vec());
        let inits = added(&report).into_iter().map(|(_, _, _, init)| init);
        (inits.collect::<Vec<_>>(), rows)
    };
    let old = |id: usize| before[id * row_bytes..(id + 1) * row_bytes].to_vec();
    let (_, rows) = resolved("zeros", &[]);
    assert_eq!(rows, [vec![0; row_bytes], vec![0; row_bytes]]);
    let (inits, rows) = resolved("copy:zz", &["--init-token", "<bb>=mean-of:7"]);
    assert_eq!(
        (inits, rows),
        (vec!["copy:586".into(), "mean-of:7".into()], [old(586), old(7)])
    );
    // The pieces are those of the strings before they were tokens.
    let (inits, _) = resolved("subtokens", &[]);
    let pieces = run(&args![
        "init",
        "--json",
        "--model",
        demo("model"),
        "--token-ids",
        "5",
        "--out",
        workspace.out(),
        "--init",
        "description:<farewell>"
    ])
    .ok()
    .json();
    assert_eq!(inits[0], pieces["row_inits"][0].as_str().unwrap());
    let (inits, _) = resolved("mean", &["--init-token", "<bb>=description:a small blue bird"]);
    assert_eq!(inits, ["mean", "mean-of:67,434,477,530"]);
    for mode in [
        "random",
        "mean:others",
        "interpolate:zz:5:0.25",
        "mean+noise:0.1+norm-match",
        "mean-covariance:1",
    ] {
        let (first, rows) = resolved(mode, &[]);
        assert_eq!(resolved(mode, &[]), (first, rows.clone()), "{mode}");
        assert_eq!(
            rows[0] != rows[1],
            !matches!(mode, "mean:others" | "interpolate:zz:5:0.25"),
            "{mode}"
        );
    }
}

/// A model of BERT with a `WordPiece` tokenizer: its bias grows, and what lists special tokens lists the new ones.
#[test]
fn a_masked_model_grows_its_bias() {
    let workspace = Workspace::new();
    let (model, out) = (workspace.path("bert"), workspace.path("grown"));
    copy_dir(&fixture("bert_mlm/base"), &model);
    let tensors = read_tensors(&model.join("model.safetensors"));
    let vocab_size = tensors["cls.predictions.bias"].1[0];
    let mut vocab = serde_json::Map::from_iter([("[UNK]".to_owned(), json!(0))]);
    // Three rows of the table are free.
    vocab.extend((1..vocab_size - 3).map(|id| (format!("w{id}"), json!(id))));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(
        model.join("special_tokens_map.json"),
        json!({"unk_token": "[UNK]", "additional_special_tokens": []}).to_string(),
    )
    .unwrap();
    let report = run(&add(&model, "<a>,<b>,<c>,<d>", &out, &["--init", "copy:w5"]))
        .ok()
        .json();
    let reused: Vec<_> = added(&report)
        .into_iter()
        .map(|(_, _, reused, _)| reused)
        .collect();
    assert_eq!(reused, [true, true, true, false]);
    assert_eq!(report["rows_appended"], 1);
    assert_eq!(
        report["tensors"],
        json!(["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"])
    );
    let map = read_json(&out.join("special_tokens_map.json"));
    assert_eq!(
        map["additional_special_tokens"],
        json!(["<a>", "<b>", "<c>", "<d>"])
    );
    let grown = read_tensors(&out.join("model.safetensors"));
    assert_eq!(grown["cls.predictions.bias"].1, [vocab_size + 1]);
    let bias = floats_of(&grown, "cls.predictions.bias");
    assert_eq!(bias[vocab_size - 3..], [bias[5]; 4]);
    assert_eq!(
        bias[..vocab_size - 3],
        floats_of(&tensors, "cls.predictions.bias")[..vocab_size - 3]
    );
}

#[test]
fn what_cannot_be_added_is_refused() {
    let workspace = Workspace::new();
    let (model, out) = (workspace.model(), workspace.out());
    workspace.refuses(&add(&model, "<a>,<a>", &out, &[]), &["'<a>'", "twice"]);
    workspace.refuses(&add(&model, "<a>,,<b>", &out, &[]), &["''", "empty"]);
    workspace.refuses(&add(&demo("model"), "<a>,<dax>", &out, &[]), &["'<dax>'", "963"]);
    workspace.refuses(&add(&model, "<a>", &out, &["--init", "keep"]), &["300", "no row"]);
    workspace.refuses(&add(&model, "<a>", &out, &["--init-token", "<b>=mean"]), &["<b>"]);
    workspace.refuses(&add(&model, "<a>", &model, &["--force"]), &["model"]);
    workspace.refuses(&add(&model, "<a>", &model.join("inside"), &[]), &["inside"]);
    workspace.refuses(&add(&workspace.path("none"), "<a>", &out, &[]), &["none"]);
    fs::create_dir(&out).unwrap();
    workspace.refuses(&add(&model, "<a>", &out, &[]), &["out", "--force"]);
    fs::remove_dir(&out).unwrap();
    run(&args!["add-tokens", "--model", model, "--out", out]).misused(&["--tokens"]);
    run(&add(&model, "<a>", &out, &["--pad-to-multiple-of", "0"])).misused(&["--pad-to-multiple-of"]);
    run(&add(&model, "<a>", &out, &["--init", "best"])).misused(&["best"]);

    // Tables that do not agree, a file that is no tokenizer, none at all.
    let mut tensors = read_tensors(&model.join("model.safetensors"));
    let head = tensors.get_mut("lm_head.weight").unwrap();
    head.1[0] -= 1;
    head.2.truncate(head.1[0] * head.1[1] * 4);
    let other = workspace.path("other");
    copy_dir(&model, &other);
    write_tensors(&other.join("model.safetensors"), &tensors);
    workspace.refuses(&add(&other, "<a>", &out, &[]), &["lm_head.weight", "299", "300"]);
    fs::write(model.join("special_tokens_map.json"), "[]").unwrap();
    workspace.refuses(&add(&model, "<a>", &out, &[]), &["special_tokens_map.json"]);
    fs::remove_file(model.join("special_tokens_map.json")).unwrap();
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    workspace.refuses(&add(&model, "<a>", &out, &[]), &["tokenizer.json"]);
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    workspace.refuses(&add(&model, "<a>", &out, &[]), &["tokenizer.json"]);
}

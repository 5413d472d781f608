//! The commands on encoders.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod support;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, json};
use support::{
    Case, args, assert_close, copy_dir, edit_json, encoder, eval, floats_of, loss, read_json, read_tensors,
    run, trains_again,
};
use tempfile::TempDir;

/// From training to the merged model, with the bias of the output layer that PEFT forgets.
#[test]
fn a_masked_language_model_goes_all_the_way() {
    let case = Case::open("bert_mlm");
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (base, data, adapter, merged) = (
        case.dir.join("base"),
        place("data.jsonl"),
        place("adapter"),
        place("merged"),
    );
    case.write_batches(&data);
    let summary = run(&args![
        "train",
        "--json",
        "--model",
        base,
        "--data",
        data,
        "--token-ids",
        case.token_ids(),
        "--padding-idx",
        "torch",
        "--batch-size",
        "2",
        "--lr",
        "0.02",
        "--out",
        adapter
    ]);
    let summary = summary.json();
    assert_eq!(summary["objective"], "masked");
    assert_eq!(summary["largest_untouched_change"], 0.0);
    let config = read_json(&adapter.join("adapter_config.json"));
    assert_eq!(config["target_modules"], json!(["word_embeddings"]));
    let keys: Vec<String> = read_tensors(&adapter.join("adapter_model.safetensors"))
        .into_keys()
        .collect();
    let modules = ["bert.embeddings.word_embeddings", "cls.predictions.decoder"];
    assert_eq!(
        keys,
        modules.map(|module| format!("base_model.model.{module}.trainable_tokens_delta"))
    );

    let verified = run(&args!["verify", "--json", "--model", base, "--adapter", adapter]).ok();
    assert_eq!(verified.json()["fits"], true);
    run(&args![
        "merge",
        "--model",
        base,
        "--adapter",
        adapter,
        "--out",
        merged
    ])
    .ok();
    let [before, beside, baked] = [
        eval(&base, None, &data, &[]),
        eval(&base, Some(&adapter), &data, &[]),
        eval(&merged, None, &data, &[]),
    ];
    assert!(loss(&beside) < loss(&before) - 1.0, "{before} {beside}");
    assert!((loss(&beside) - loss(&baked)).abs() < 1e-6, "{beside} {baked}");
    let inspected = run(&args!["inspect", "--json", merged]).ok().json();
    assert_eq!(inspected["model_type"], "bert");
}

/// PEFT's numbers for the base and for its own adapter, merged: there it has the bias.
#[test]
fn logits_have_the_bias() {
    let case = Case::open("bert_mlm");
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let base = case.dir.join("base");
    let ids = place("ids.json");
    fs::write(&ids, json!(case.integers("probe.input_ids")).to_string()).unwrap();
    let forward = |model: &Path, adapter: Option<PathBuf>| {
        let out = place("forward.safetensors");
        let mut args = args![
            "forward",
            "--force",
            "--model",
            model,
            "--input-ids",
            ids,
            "--out",
            out
        ];
        args.extend(
            adapter
                .into_iter()
                .flat_map(|adapter| args!["--adapter", adapter]),
        );
        run(&args).ok();
        read_tensors(&out)
    };
    let plain = forward(&base, None);
    assert_close(
        "embeddings",
        &floats_of(&plain, "embeddings"),
        &case.floats("embed.base"),
        0.0,
        0.0,
    );
    assert_close(
        "logits",
        &floats_of(&plain, "logits"),
        &case.floats("logits.base"),
        2e-5,
        1e-4,
    );
    let trained = forward(&base, Some(case.dir.join("adapter")));
    assert_close(
        "merged",
        &floats_of(&trained, "logits"),
        &case.floats("logits.merged"),
        5e-5,
        1e-4,
    );
}

/// Sentences with definitions of the fixture, as JSON Lines.
fn defined() -> String {
    let file = encoder("sentences").join("expected.safetensors");
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
    let rows = |name: &str| tensors[name].to_vec2::<i64>().unwrap();
    let each = |name: &str| {
        let values = tensors[name].to_vec1::<i64>().unwrap();
        values.into_iter().map(|value| usize::try_from(value).unwrap())
    };
    let (sentences, definitions) = (rows("input_ids"), rows("definition_ids"));
    let held: Vec<usize> = each("definition_lengths").collect();
    let mut text = String::new();
    for (row, (length, own)) in each("lengths").zip(each("own")).enumerate() {
        let line = json!({
            "input_ids": sentences[row][..length],
            "definition_ids": definitions[own][..held[own]],
        });
        writeln!(text, "{line}").unwrap();
    }
    text
}

#[test]
fn words_are_taught_and_found() {
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (model, data, adapter, merged) = (
        encoder("sentences"),
        place("data.jsonl"),
        place("adapter"),
        place("merged"),
    );
    fs::write(&data, defined()).unwrap();
    let summary = run(&args![
        "train",
        "--json",
        "--model",
        model,
        "--data",
        data,
        "--token-ids",
        "77,12,40",
        "--objective",
        "teach",
        "--teach-loss",
        "ranking",
        "--steps",
        "60",
        "--lr",
        "0.01",
        "--out",
        adapter
    ]);
    let summary = summary.ok().json();
    let mrr = |when: &str| summary[when]["mrr"].as_f64().unwrap();
    assert!(mrr("retrieval_after") > mrr("retrieval_before"), "{summary}");
    run(&args!["verify", "--model", model, "--adapter", adapter]).ok();
    run(&args![
        "merge",
        "--model",
        model,
        "--adapter",
        adapter,
        "--out",
        merged
    ])
    .ok();
    let teach = ["--objective", "teach", "--teach-loss", "ranking"];
    let beside = eval(&model, Some(&adapter), &data, &teach);
    // A merged model is a sentence encoder still.
    let baked = eval(&merged, None, &data, &teach);
    for report in [&beside, &baked] {
        assert_eq!(report["mrr"], summary["retrieval_after"]["mrr"], "{report}");
        assert_eq!(report["definitions"], 3);
        assert!(report.get("perplexity").is_none());
    }
    let text = run(&args![
        "eval",
        "--model",
        merged,
        "--data",
        data,
        "--objective",
        "teach"
    ])
    .ok();
    assert!(text.stdout.contains("MRR"), "{text:#?}");

    let (ids, out) = (place("ids.json"), place("forward.safetensors"));
    fs::write(&ids, "[[2, 77, 9, 3]]").unwrap();
    let shapes = run(&args![
        "forward",
        "--json",
        "--model",
        model,
        "--input-ids",
        ids,
        "--out",
        out
    ])
    .ok();
    let shapes = shapes.json();
    assert_eq!(shapes["sentence_embeddings"], json!([1, 24]));
    assert_eq!(
        (shapes.get("logits"), &shapes["hidden"]),
        (None, &json!([1, 4, 24]))
    );
    let norm: f32 = floats_of(&read_tensors(&out), "sentence_embeddings")
        .iter()
        .map(|x| x * x)
        .sum();
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");

    // Its tokens predict nothing.
    let masked = args!["eval", "--model", model, "--data", data];
    run(&masked).refused(&[
        "line 1",
        "a sentence with a definition, which the objective masked cannot use",
    ]);
}

/// A tokenizer of whole words: w4 to w89 after four special ones.
fn write_tokenizer(dir: &Path) {
    const SPECIAL: [&str; 4] = ["[PAD]", "[UNK]", "[CLS]", "[MASK]"];
    let mut vocab = Map::new();
    for id in 0..90 {
        let name = SPECIAL
            .get(id)
            .map_or_else(|| format!("w{id}"), |name| (*name).to_owned());
        vocab.insert(name, id.into());
    }
    let added = SPECIAL.iter().enumerate().map(|(id, name)| {
        json!({"id": id, "content": name, "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

#[test]
fn texts_are_masked_by_their_seed() {
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (model, data) = (place("model"), place("data.jsonl"));
    copy_dir(&encoder("bert"), &model);
    write_texts(&data);
    run(&args!["eval", "--model", model, "--data", data]).refused(&["tokenizer.json"]);
    write_tokenizer(&model);
    let train = |out: &str, seed: &str| {
        let out = place(out);
        run(&args![
            "train",
            "--model",
            model,
            "--data",
            data,
            "--tokens",
            "w4,w21",
            "--mask-probability",
            "0.3",
            "--steps",
            "4",
            "--batch-size",
            "4",
            "--seed",
            seed,
            "--out",
            out
        ])
        .ok();
        read_tensors(&out.join("adapter_model.safetensors"))
    };
    let [one, same, other] = [train("one", "1"), train("same", "1"), train("other", "2")];
    assert_eq!(one, same);
    assert_ne!(one, other);
    let tokens = |more: &[&str]| eval(&model, None, &data, more)["tokens"].as_u64().unwrap();
    assert_eq!(tokens(&["--mask-probability", "1"]), 48);
    assert!((6..24).contains(&tokens(&[])));
    let wrong = args![
        "eval",
        "--model",
        model,
        "--data",
        data,
        "--mask-probability",
        "1.5"
    ];
    run(&wrong).refused(&["the mask probability is 1.5"]);
    let causal = args!["eval", "--model", model, "--data", data, "--objective", "causal"];
    run(&causal).refused(&["the objective causal is not for an encoder"]);
}

/// What is cut off a line of text is text: its last token is the special one that ends every text.
#[test]
fn special_tokens_of_cut_texts_stay() {
    let home = TempDir::new().unwrap();
    let (model, texts, ids) = (
        home.path().join("model"),
        home.path().join("t.jsonl"),
        home.path().join("i.jsonl"),
    );
    copy_dir(&encoder("bert"), &model);
    write_tokenizer(&model);
    edit_json(&model.join("tokenizer.json"), |tokenizer| {
        tokenizer["post_processor"] =
            json!({"type": "BertProcessing", "sep": ["[UNK]", 1], "cls": ["[CLS]", 2]});
    });
    let line = |sentence: &str, definition: &str| {
        json!({"sentence": sentence, "definition": definition}).to_string()
    };
    fs::write(&texts, line("w9 w8 w7 w6 w5 w4", "w10 w11 w12 w13 w14")).unwrap();
    fs::write(
        &ids,
        json!({"input_ids": [2, 9, 8, 7, 1], "definition_ids": [2, 10, 11, 12, 1]}).to_string(),
    )
    .unwrap();
    let cosine = |data: &Path, more: &[&str]| {
        let report = eval(&model, None, data, &[&["--objective", "teach"], more].concat());
        report["cosine"].as_f64().unwrap()
    };
    let cut = cosine(&texts, &["--max-length", "5"]);
    assert_eq!(cut.to_bits(), cosine(&ids, &[]).to_bits());
    assert_ne!(cut.to_bits(), cosine(&texts, &[]).to_bits());
    let wrong = args![
        "eval",
        "--model",
        model,
        "--data",
        texts,
        "--objective",
        "teach",
        "--max-length",
        "2"
    ];
    run(&wrong).refused(&["max-length 2 leaves no room for text: the tokenizer adds 2 special tokens"]);
}

/// Texts of `w4` to `w89` for a model with [`write_tokenizer`]'s tokenizer.
fn write_texts(path: &Path) {
    let line = |row: usize| {
        let words = (0..8).map(|at| format!("w{}", 4 + (row * 31 + at * 17) % 86));
        format!("{}\n", json!({ "text": words.collect::<Vec<_>>().join(" ") }))
    };
    fs::write(path, (0..6).map(line).collect::<String>()).unwrap();
}

#[test]
fn objectives_are_options_in_a_file() {
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (data, masked, taught) = (place("data.jsonl"), place("masked"), place("taught"));
    let model = place("model");
    copy_dir(&encoder("bert"), &model);
    write_tokenizer(&model);
    write_texts(&data);
    let file = |name: &str, text: &str| {
        let path = place(name);
        fs::write(&path, text).unwrap();
        path
    };
    let config = file(
        "masked.toml",
        &format!(
            "model = {model:?}\ndata = {data:?}\ntokens = [\"w4\", \"w21\"]\nobjective = \"masked\"\n\
             mask_probability = 0.3\nmask_trainable = \"always\"\nsteps = 3\nbatch_size = 2\naccumulate = 2\n"
        ),
    );
    run(&args!["train", "--config", config, "--out", masked]).ok();
    let recorded = fs::read_to_string(masked.join("train_config.toml")).unwrap();
    for line in [
        "objective = \"masked\"",
        "mask-probability = 0.3",
        "mask-trainable = \"always\"",
        "accumulate = 2",
    ] {
        assert!(recorded.lines().any(|it| it == line), "no {line} in {recorded}");
    }
    trains_again(&masked, &place("masked-again"));

    let sentences = place("sentences.jsonl");
    fs::write(&sentences, defined()).unwrap();
    let model = encoder("sentences");
    let config = file(
        "taught.toml",
        &format!(
            "model = {model:?}\ndata = {sentences:?}\ntoken_ids = \"77,12,40\"\nobjective = \"teach\"\n\
             teach_loss = \"ranking\"\nranking_scale = 10\nsteps = 3\n"
        ),
    );
    run(&args!["train", "--config", config, "--out", taught]).ok();
    let recorded = fs::read_to_string(taught.join("train_config.toml")).unwrap();
    for line in ["teach-loss = \"ranking\"", "ranking-scale = 10.0"] {
        assert!(recorded.lines().any(|it| it == line), "no {line} in {recorded}");
    }
    trains_again(&taught, &place("taught-again"));
    let wrong = file("wrong.toml", "objective = \"clm\"\n");
    run(&args![
        "train",
        "--config",
        wrong,
        "--model",
        model,
        "--data",
        sentences,
        "--token-ids",
        "7",
        "--out",
        place("none")
    ])
    .refused(&["wrong.toml, line 1", "clm"]);
}

/// New tokens, a run that is watched, and a look at what became of the rows.
#[test]
fn new_tokens_of_an_encoder_train_and_are_looked_at() {
    let home = TempDir::new().unwrap();
    let place = |name: &str| home.path().join(name);
    let (base, model, data) = (place("base"), place("model"), place("data.jsonl"));
    copy_dir(&encoder("bert"), &base);
    write_tokenizer(&base);
    let added = run(&args![
        "add-tokens",
        "--json",
        "--model",
        base,
        "--tokens",
        "glorp,blick",
        "--out",
        model
    ])
    .ok()
    .json();
    let tables = added["tensors"].as_array().unwrap();
    for tensor in ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"] {
        assert!(tables.contains(&json!(tensor)), "{added}");
    }
    let line = |row: u32| {
        let text = format!("w{} glorp w{} w9", 10 + row, 30 + row);
        json!({ "text": text }).to_string()
    };
    let lines = (0..8).map(line).collect::<Vec<_>>().join("\n");
    fs::write(&data, lines).unwrap();
    let (adapter, metrics, report) = (place("adapter"), place("metrics.jsonl"), place("report.html"));
    let summary = run(&args![
        "train",
        "--json",
        "--model",
        model,
        "--data",
        data,
        "--eval-data",
        data,
        "--tokens",
        "glorp,blick",
        "--mask-trainable",
        "always",
        "--steps",
        "6",
        "--eval-every",
        "2",
        "--batch-size",
        "4",
        "--accumulate",
        "2",
        "--early-stopping-patience",
        "3",
        "--keep-best",
        "--lr",
        "0.01",
        "--metrics",
        metrics,
        "--report",
        report,
        "--out",
        adapter
    ])
    .ok()
    .json();
    assert_eq!(summary["objective"], "masked");
    let dead = summary["dead_tokens"].as_array().unwrap();
    assert!(dead.len() == 1 && dead[0]["token"] == "blick", "{summary}");
    assert!(fs::read_to_string(&report).unwrap().contains("glorp"));
    run(&args!["plot", metrics, "--out", place("plot.svg")]).ok();

    let fits = run(&args!["verify", "--json", "--model", model, "--adapter", adapter])
        .ok()
        .json();
    assert_eq!(fits["fits"], true, "{fits}");
    let looked = run(&args!["inspect", "--json", adapter, "--model", model])
        .ok()
        .json();
    let row = &looked["modules"][0]["rows"][0];
    assert_eq!(row["token"], "glorp");
    assert!(!row["neighbours"].as_array().unwrap().is_empty(), "{row}");
    run(&args!["generate", "--model", model, "--prompt", "w4 w5"])
        .refused(&["is a bert, an encoder: only a decoder continues a prompt"]);
}

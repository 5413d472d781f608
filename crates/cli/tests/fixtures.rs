//! PEFT's whole-model cases, through the program: training, forward passes, merging, evaluation, resuming.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{
    Case, Tensors, args, assert_close, checkpoint_tensors, fixture, floats_of, read_json, read_json_lines,
    read_tensors, run, snapshot,
};

const ROWS: &str = "base_model.model.model.embed_tokens.trainable_tokens_delta";
const LLAMAS: [&str; 2] = ["llama_untied", "llama_tied"];

/// `train` with a case's model and tokens.
fn plain_train_args(case: &Case, data: &Path, out: &Path) -> Vec<OsString> {
    let (base, ids) = (case.dir.join("base"), case.token_ids());
    args![
        "train",
        "--json",
        "--model",
        base,
        "--data",
        data,
        "--token-ids",
        ids,
        "--out",
        out,
        "--batch-size",
        "2",
    ]
}

/// `train` with a case's hyper-parameters too.
fn train_args(case: &Case, data: &Path, out: &Path) -> Vec<OsString> {
    let operation = case.operations(&["train"]).next().unwrap();
    let spec = &operation["optimizer"];
    assert_eq!(spec["type"], "AdamW");
    assert_eq!(operation["steps"], 20);
    let settings = [
        ("--lr", &spec["lr"]),
        ("--beta1", &spec["betas"][0]),
        ("--beta2", &spec["betas"][1]),
        ("--eps", &spec["eps"]),
        ("--weight-decay", &spec["weight_decay"]),
    ];
    let settings = settings
        .iter()
        .flat_map(|(name, value)| args![name, value.to_string()]);
    let args = with(plain_train_args(case, data, out), args!["--optimizer", "adamw"]);
    with(args, settings.collect())
}

fn with(mut args: Vec<OsString>, more: Vec<OsString>) -> Vec<OsString> {
    args.extend(more);
    args
}

#[test]
fn training_follows_peft_step_by_step() {
    for name in LLAMAS {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (data, out, metrics) = (path("batches.jsonl"), path("adapter"), path("metrics.jsonl"));
        case.write_batches(&data);
        let before = snapshot(&case.dir);
        let args = with(train_args(&case, &data, &out), args!["--metrics", metrics]);
        let summary = run(&args).ok().json();
        assert!(snapshot(&case.dir) == before, "{name}: the case changed");

        let operation = case.operations(&["train"]).next().unwrap();
        let [loss_atol, rows_atol] =
            ["losses", "deltas"].map(|tensor| operation["atol"][tensor].as_f64().unwrap());
        let rtol = operation["rtol"].as_f64().unwrap();
        let lines = read_json_lines(&metrics);
        assert_eq!(lines.len(), 21, "{name}: 20 steps and the summary");
        let losses = case.floats("losses");
        for (at, line) in lines[..20].iter().enumerate() {
            assert_eq!(line["step"], json!(at + 1), "{name}");
            assert_eq!(line["lr"], operation["optimizer"]["lr"], "{name}");
            let loss = line["loss"].as_f64().unwrap();
            let want = f64::from(losses[at]);
            assert!(
                (loss - want).abs() <= loss_atol + rtol * want.abs(),
                "{name}: loss of step {}: got {loss}, want {want}",
                at + 1
            );
            let number = |field: &str| {
                line[field]
                    .as_f64()
                    .unwrap_or_else(|| panic!("{name}: no {field}"))
            };
            assert!(
                number("grad_norm") > 0.0 && number("seconds") > 0.0,
                "{name}: {line}"
            );
            assert!(
                number("tokens") > 0.0 && number("peak_rss_bytes") > 1e6,
                "{name}: {line}"
            );
        }
        assert_eq!(lines[20], json!({"summary": summary}), "{name}");

        let rows = floats_of(&read_tensors(&out.join("adapter_model.safetensors")), ROWS);
        let deltas = case.floats("deltas");
        let last = &deltas[deltas.len() - rows.len()..];
        assert_eq!(deltas.len(), 21 * rows.len(), "{name}");
        assert_close(&format!("{name}: final rows"), &rows, last, rows_atol, rtol);
        check_summary(&case, &summary, &lines, &out);
        check_like_peft(&case, &out);
        let kept: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(kept.len(), 3, "{name}: {kept:?}");
    }
}

fn check_summary(case: &Case, summary: &Value, lines: &[Value], out: &Path) {
    let tokens = case.json["token_indices"].as_array().unwrap().len();
    let module = &case.json["modules"][0];
    let (vocab_size, dim) = (
        &module["num_embeddings"],
        module["embedding_dim"].as_u64().unwrap(),
    );
    assert_eq!(summary["adapter"], json!(out), "{summary}");
    assert_eq!(summary["steps"], 20, "{summary}");
    assert_eq!(summary["rows_trained"], json!(tokens), "{summary}");
    assert_eq!(&summary["vocab_size"], vocab_size, "{summary}");
    assert_eq!(
        summary["parameters_trained"],
        json!(tokens as u64 * dim),
        "{summary}"
    );
    let shapes = case.json["base"]["tensors"].as_object().unwrap().values();
    let total: u64 = shapes
        .map(|shape| {
            shape
                .as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_u64().unwrap())
                .product::<u64>()
        })
        .sum();
    assert_eq!(summary["parameters_total"], json!(total), "{summary}");
    assert_eq!(
        summary["table_bytes"],
        json!(vocab_size.as_u64().unwrap() * dim * 4),
        "{summary}"
    );
    let size = fs::metadata(out.join("adapter_model.safetensors")).unwrap().len();
    assert_eq!(summary["adapter_bytes"], json!(size), "{summary}");
    assert_eq!(summary["largest_untouched_change"], json!(0.0), "{summary}");
    assert_eq!(summary["loss_before"], lines[0]["loss"], "{summary}");
    assert_eq!(summary["loss_after"], lines[19]["loss"], "{summary}");
    assert!(
        summary["gradient_check_error"].as_f64().unwrap() < 0.1,
        "{summary}"
    );
}

/// The adapter has the tensors, shapes, element types, tokens and config fields of PEFT's own.
fn check_like_peft(case: &Case, out: &Path) {
    let shapes = |dir: &Path| {
        let tensors = read_tensors(&dir.join("adapter_model.safetensors"));
        let shapes = tensors
            .into_iter()
            .map(|(name, (dtype, shape, _))| (name, dtype, shape));
        shapes.collect::<Vec<_>>()
    };
    let peft = case.dir.join("adapter");
    assert_eq!(shapes(out), shapes(&peft));
    let [ours, theirs] = [out, &peft].map(|dir| read_json(&dir.join("adapter_config.json")));
    for field in ["peft_type", "token_indices", "target_modules"] {
        assert_eq!(ours[field], theirs[field], "{field}");
    }
    // The copies of tied rows are one.
    let tensors = read_tensors(&out.join("adapter_model.safetensors"));
    assert!(tensors.values().all(|tensor| *tensor == tensors[ROWS]));
}

/// `forward`, into tensors.
fn forward(model: &Path, adapter: Option<&Path>, ids: &[Vec<i64>]) -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("ids.json"), dir.path().join("out.safetensors"));
    fs::write(&input, json!(ids).to_string()).unwrap();
    let mut args = args![
        "forward",
        "--json",
        "--model",
        model,
        "--input-ids",
        input,
        "--out",
        out
    ];
    if let Some(adapter) = adapter {
        args.extend(args!["--adapter", adapter]);
    }
    let report = run(&args).ok().json();
    let tensors = read_tensors(&out);
    assert_eq!(tensors.len(), 2);
    for (name, (_, shape, _)) in &tensors {
        assert_eq!(report[name], json!(shape), "{report}");
        assert_eq!(shape[..2], [ids.len(), ids[0].len()], "{report}");
    }
    tensors
}

/// Writes an adapter that changes nothing.
fn init(case: &Case, out: &Path) {
    let ids = case.token_ids();
    let args = args![
        "init",
        "--json",
        "--model",
        case.dir.join("base"),
        "--token-ids",
        ids,
        "--out",
        out
    ];
    let report = run(&args).ok().json();
    assert_eq!(report["token_indices"], case.json["token_indices"], "{report}");
    assert_eq!(report["adapter"], json!(out), "{report}");
}

#[test]
fn forward_passes_are_pefts() {
    for name in LLAMAS {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let noop = dir.path().join("noop");
        init(&case, &noop);
        let (base, merged, trained) = (
            case.dir.join("base"),
            case.dir.join("merged"),
            case.dir.join("adapter"),
        );
        let ids = case.integers("probe.input_ids");
        let states = [
            ("base", forward(&base, None, &ids)),
            ("noop", forward(&base, Some(&noop), &ids)),
            ("adapter", forward(&base, Some(&trained), &ids)),
            ("merged", forward(&merged, None, &ids)),
        ];
        let mut checked = 0;
        for operation in case.operations(&["embed_forward", "logits"]) {
            let state = operation["state"].as_str().unwrap();
            let (_, tensors) = states.iter().find(|(name, _)| *name == state).unwrap();
            let tensor = match operation["op"].as_str().unwrap() {
                "logits" => "logits",
                _ => "embeddings",
            };
            let [atol, rtol] = ["atol", "rtol"].map(|key| operation[key].as_f64().unwrap());
            assert!(tensor == "logits" || (atol == 0.0 && rtol == 0.0));
            let want = operation["expect"].as_str().unwrap();
            assert_eq!(tensors[tensor].1, case.expected[want].dims(), "{name}: {want}");
            assert_close(
                &format!("{name}: {want}"),
                &floats_of(tensors, tensor),
                &case.floats(want),
                atol,
                rtol,
            );
            checked += 1;
        }
        assert_eq!(checked, 7, "{name}");
        let [(_, base), (_, noop), (_, adapter), (_, merged)] = &states;
        assert!(base == noop, "{name}: an initial adapter changes something");
        assert!(base != adapter, "{name}: a trained adapter changes nothing");
        // A tied head with rows of its own sums in another order than one product with the merged table.
        let same = adapter["embeddings"] == merged["embeddings"];
        assert!(same, "{name}: merged rows are other rows");
        if name == "llama_untied" {
            assert!(adapter == merged, "{name}: merged rows compute something else");
        }
    }
}

#[test]
fn an_initial_adapter_holds_the_rows_of_the_base() {
    for name in LLAMAS {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("noop");
        init(&case, &out);
        check_like_peft(&case, &out);
        let table = checkpoint_tensors(&case.dir.join("base"));
        let table = floats_of(&table, "model.embed_tokens.weight");
        let dim = usize::try_from(case.json["modules"][0]["embedding_dim"].as_u64().unwrap()).unwrap();
        let ids = case.json["token_indices"].as_array().unwrap();
        let want: Vec<f32> = ids
            .iter()
            .flat_map(|id| {
                let id = usize::try_from(id.as_u64().unwrap()).unwrap();
                table[id * dim..][..dim].to_vec()
            })
            .collect();
        let rows = floats_of(&read_tensors(&out.join("adapter_model.safetensors")), ROWS);
        assert_close(name, &rows, &want, 0.0, 0.0);
    }
}

#[test]
fn merging_gives_pefts_checkpoint_bit_for_bit() {
    for name in ["llama_untied", "llama_tied", "qwen2_sharded"] {
        let case = Case::open(name);
        let (base, adapter) = (case.dir.join("base"), case.dir.join("adapter"));
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let before = snapshot(&case.dir);
        let report = run(&args![
            "merge",
            "--json",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            out
        ])
        .ok()
        .json();
        assert!(snapshot(&case.dir) == before, "{name}: the case changed");

        assert!(
            checkpoint_tensors(&out) == checkpoint_tensors(&case.dir.join("merged")),
            "{name}"
        );
        assert!(checkpoint_tensors(&out) != checkpoint_tensors(&base), "{name}");
        let names = |field: &str| -> Vec<PathBuf> { serde_json::from_value(report[field].clone()).unwrap() };
        let rewritten = names("rewritten");
        assert_eq!(rewritten.len(), 1, "{name}: {report}");
        assert_eq!(report["left_out"], json!([]), "{name}");
        assert_eq!(
            report["rows"],
            json!(case.json["token_indices"].as_array().unwrap().len()),
            "{name}"
        );
        // What the report says is the same, is; together the files are those of the base.
        let mut all = rewritten.clone();
        for file in names("shared").into_iter().chain(names("copied")) {
            assert!(
                fs::read(out.join(&file)).unwrap() == fs::read(base.join(&file)).unwrap(),
                "{name}: {file:?}"
            );
            all.push(file);
        }
        all.sort();
        let mut expected: Vec<PathBuf> = snapshot(&base)
            .into_keys()
            .map(|path| path.strip_prefix(&base).unwrap().to_owned())
            .collect();
        expected.sort();
        assert_eq!(all, expected, "{name}");
        assert_eq!(snapshot(&out).len(), all.len(), "{name}");
        let sharded = name == "qwen2_sharded";
        assert_eq!(names("shared").len(), if sharded { 2 } else { 0 }, "{name}");
        // Header and order of the rewritten file stay.
        let [old, new] = [&base, &out].map(|dir| fs::read(dir.join(&rewritten[0])).unwrap());
        let header = 8 + usize::try_from(u64::from_le_bytes(old[..8].try_into().unwrap())).unwrap();
        assert_eq!(old.len(), new.len(), "{name}");
        assert!(old[..header] == new[..header], "{name}");
    }
}

/// Mean cross-entropy of the unmasked targets, in f64, and how many there are.
fn mean_loss(logits: &[f32], vocab_size: usize, labels: &[Vec<i64>]) -> (f64, u64) {
    let (mut sum, mut count) = (0.0, 0u32);
    let length = labels[0].len();
    for (row, labels) in labels.iter().enumerate() {
        for (place, label) in labels.iter().enumerate().skip(1) {
            let Ok(label) = usize::try_from(*label) else {
                assert_eq!(*label, -100);
                continue;
            };
            let scores = &logits[(row * length + place - 1) * vocab_size..][..vocab_size];
            let largest = scores.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = scores
                .iter()
                .map(|score| (f64::from(*score) - f64::from(largest)).exp())
                .sum();
            sum += f64::from(largest) + total.ln() - f64::from(scores[label]);
            count += 1;
        }
    }
    (sum / f64::from(count), u64::from(count))
}

#[test]
fn eval_is_the_mean_loss_of_the_logits() {
    for name in LLAMAS {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("batches.jsonl");
        case.write_batches(&data);
        let (base, adapter) = (case.dir.join("base"), case.dir.join("adapter"));
        let (ids, labels) = (case.integers("batch.input_ids"), case.integers("batch.labels"));
        let mut losses = Vec::new();
        for adapter in [None, Some(adapter.as_path())] {
            let tensors = forward(&base, adapter, &ids);
            let vocab_size = tensors["logits"].1[2];
            let (want, targets) = mean_loss(&floats_of(&tensors, "logits"), vocab_size, &labels);
            for batch_size in ["8", "3", "40"] {
                let mut args = args![
                    "eval",
                    "--json",
                    "--model",
                    base,
                    "--data",
                    data,
                    "--batch-size",
                    batch_size
                ];
                if let Some(adapter) = adapter {
                    args.extend(args!["--adapter", adapter]);
                }
                let report = run(&args).ok().json();
                let [loss, perplexity] = ["loss", "perplexity"].map(|key| report[key].as_f64().unwrap());
                assert!((loss - want).abs() < 1e-5, "{name}: {report}, want {want}");
                assert!(
                    (perplexity - loss.exp()).abs() < 1e-9 * perplexity,
                    "{name}: {report}"
                );
                assert_eq!(report["tokens"], json!(targets), "{name}: {report}");
                losses.push(loss);
            }
        }
        assert!(losses[3] < losses[0] - 0.1, "{name}: training helped: {losses:?}");
    }
}

#[test]
fn healthy_adapters_are_verified() {
    for name in LLAMAS {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("ours");
        init(&case, &ours);
        for (adapter, digest) in [(case.dir.join("adapter"), false), (ours, true)] {
            let base = case.dir.join("base");
            let args = args!["verify", "--json", "--model", base, "--adapter", adapter];
            let report = run(&args).ok().json();
            assert_eq!(report["fits"], json!(true), "{report}");
            let outcome = |check: &str| {
                let checks = report["checks"].as_array().unwrap();
                let found = checks.iter().find(|found| found["check"] == check);
                found.unwrap_or_else(|| panic!("no {check} in {report}"))["ok"].clone()
            };
            let tokenizer = base.join("tokenizer.json").exists();
            let if_known = |known: bool| if known { json!(true) } else { Value::Null };
            assert_eq!(outcome("vocabulary and dimensions"), json!(true));
            assert_eq!(outcome("finite values"), json!(true));
            assert_eq!(outcome("base table"), if_known(digest), "{report}");
            assert_eq!(
                outcome("token strings"),
                if_known(digest && tokenizer),
                "{report}"
            );
            assert_eq!(outcome("tied copies"), if_known(name == "llama_tied"), "{report}");
            let text = run(&args!["verify", "--model", base, "--adapter", adapter]).ok();
            assert!(text.stdout.ends_with("the adapter fits the model\n"), "{text:?}");
        }
    }
}

#[test]
fn inspect_shows_an_adapter() {
    for name in LLAMAS {
        let case = Case::open(name);
        let (base, adapter) = (case.dir.join("base"), case.dir.join("adapter"));
        let report = run(&args!["inspect", "--json", adapter, "--model", base])
            .ok()
            .json();
        assert_eq!(report["kind"], "adapter");
        assert_eq!(report["base_model_name_or_path"], "base");
        assert_eq!(report["target_modules"], json!(["embed_tokens"]));
        assert_eq!(report["peft_version"], case.json["versions"]["peft"]);
        assert_eq!(report["base_digest"], Value::Null);
        let modules = report["modules"].as_array().unwrap();
        assert_eq!(modules.len(), 1, "{report}");
        let module = &modules[0];
        assert_eq!(module["module"], "model.embed_tokens");
        let tied = if name == "llama_tied" {
            json!(["lm_head"])
        } else {
            json!([])
        };
        assert_eq!(module["tied"], tied);
        assert_eq!(module["dtype"], "F32");
        let dim = &case.json["modules"][0]["embedding_dim"];
        let ids = case.json["token_indices"].as_array().unwrap();
        assert_eq!(module["shape"], json!([ids.len(), dim]));

        let dim = usize::try_from(dim.as_u64().unwrap()).unwrap();
        let rows = floats_of(&read_tensors(&adapter.join("adapter_model.safetensors")), ROWS);
        let table = floats_of(&checkpoint_tensors(&base), "model.embed_tokens.weight");
        let shown = module["rows"].as_array().unwrap();
        assert_eq!(shown.len(), ids.len());
        for (slot, (shown, id)) in shown.iter().zip(ids).enumerate() {
            assert_eq!(&shown["token_id"], id);
            let row = &rows[slot * dim..][..dim];
            let from = &table[usize::try_from(id.as_u64().unwrap()).unwrap() * dim..][..dim];
            let length = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let norm = length(&mut row.iter().map(|x| f64::from(*x)));
            let drift = length(&mut row.iter().zip(from).map(|(a, b)| f64::from(*a) - f64::from(*b)));
            assert!((shown["norm"].as_f64().unwrap() - norm).abs() < 1e-6, "{shown}");
            assert!((shown["drift"].as_f64().unwrap() - drift).abs() < 1e-6, "{shown}");
            assert!(drift > 1e-3, "{shown}");
        }
        let without = run(&args!["inspect", "--json", adapter]).ok().json();
        assert_eq!(without["modules"][0]["rows"][0].get("drift"), None);
    }
}

#[test]
fn inspect_shows_our_adapter_with_its_tokens() {
    let case = Case::open("llama_untied");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("noop");
    init(&case, &out);
    let base = case.dir.join("base");
    let report = run(&args!["inspect", "--json", out, "--model", base]).ok().json();
    let model = run(&args!["inspect", "--json", base]).ok().json();
    assert_eq!(report["base_digest"], model["digest"]);
    assert_eq!(report["vocab_size"], 300);
    assert_eq!(report["init"], "keep");
    let shown = report["modules"][0]["rows"].as_array().unwrap();
    let tokens: Vec<&Value> = shown.iter().map(|row| &row["token"]).collect();
    assert_eq!(tokens, ["<answer>", "<think>", "</think>", "bor"]);
    assert!(shown.iter().all(|row| row["drift"] == json!(0.0)), "{report}");
}

#[test]
fn inspect_shows_a_model() {
    for name in LLAMAS {
        let case = Case::open(name);
        let report = run(&args!["inspect", "--json", case.dir.join("base")])
            .ok()
            .json();
        let module = &case.json["modules"][0];
        assert_eq!(report["kind"], "model");
        assert_eq!(report["model_type"], "llama");
        assert_eq!(report["vocab_size"], module["num_embeddings"]);
        assert_eq!(report["embedding_dim"], module["embedding_dim"]);
        assert_eq!(report["dtype"], "F32");
        assert_eq!(report["tie_word_embeddings"], json!(name == "llama_tied"));
        assert_eq!(report["pad_token_id"], 3);
        assert!(report["digest"].as_str().unwrap().starts_with("sha256:"));
        let free = if name == "llama_tied" {
            Value::Null
        } else {
            json!([])
        };
        assert_eq!(report["free_rows"], free);
        check_tensor_list(&report["tensors"], &checkpoint_tensors(&case.dir.join("base")));
    }
}

#[test]
fn inspect_names_free_rows() {
    let case = Case::open("llama_untied");
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    support::copy_dir(&case.dir.join("base"), &model);
    support::edit_json(&model.join("tokenizer.json"), |tokenizer| {
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| token["id"] != 299 && token["id"] != 298);
    });
    let report = run(&args!["inspect", "--json", model]).ok().json();
    assert_eq!(report["free_rows"], json!([298, 299]));
}

#[test]
fn inspect_shows_a_file() {
    let path = fixture("llama_untied/base/model.safetensors");
    let report = run(&args!["inspect", "--json", path]).ok().json();
    assert_eq!(report["kind"], "safetensors");
    assert_eq!(report["metadata"], json!({"format": "pt"}));
    check_tensor_list(&report["tensors"], &read_tensors(&path));
}

fn check_tensor_list(shown: &Value, tensors: &Tensors) {
    let want: Vec<Value> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            json!({"name": name, "dtype": format!("{dtype:?}"), "shape": shape, "bytes": bytes.len()})
        })
        .collect();
    assert_eq!(shown, &json!(want));
}

/// Twenty steps straight, and seven steps continued to twenty, in another directory and in the same.
fn resumed_run_is_the_straight_run(name: &str, more: &[&str]) {
    let case = Case::open(name);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let data = path("batches.jsonl");
    case.write_batches(&data);
    let train = |out: &str, steps: &str, rest: Vec<OsString>| {
        let args = match more {
            [] => train_args(&case, &data, &path(out)),
            _ => with(
                plain_train_args(&case, &data, &path(out)),
                more.iter().map(OsString::from).collect(),
            ),
        };
        let args = with(args, args!["--steps", steps, "--save-every", "7"]);
        run(&with(args, rest)).ok().json()
    };
    let metrics = path("metrics.jsonl");
    train("straight", "20", args!["--metrics", path("straight.jsonl")]);
    train("part", "7", args!["--metrics", metrics]);
    let state = |dir: &str, file: &str| fs::read(path(dir).join(file)).unwrap();
    let rows = "adapter_model.safetensors";
    assert!(state("part", rows) != state("straight", rows), "{name}");
    let elsewhere = train("elsewhere", "20", args!["--resume", path("part")]);
    assert_eq!(elsewhere["steps"], 20);
    // In place, no --force is needed, and the metrics go on.
    train(
        "part",
        "20",
        args!["--resume", path("part"), "--metrics", metrics],
    );
    for out in ["elsewhere", "part"] {
        for file in [rows, "training_state.safetensors", "adapter_config.json"] {
            assert!(
                state(out, file) == state("straight", file),
                "{name}: {file} of {out}"
            );
        }
    }
    let losses = |file: &Path| -> Vec<(Value, Value)> {
        let lines = read_json_lines(file).into_iter();
        let steps = lines.filter(|line| line.get("summary").is_none());
        steps
            .map(|line| (line["step"].clone(), line["loss"].clone()))
            .collect()
    };
    let straight = losses(&path("straight.jsonl"));
    assert_eq!(straight.len(), 20, "{name}");
    assert_eq!(losses(&metrics), straight, "{name}");
}

#[test]
fn a_resumed_run_goes_on_bit_for_bit() {
    resumed_run_is_the_straight_run("llama_untied", &[]);
    resumed_run_is_the_straight_run(
        "llama_tied",
        &["--shuffle", "--seed", "5", "--max-grad-norm", "0.5"],
    );
    let sgd = [
        "--optimizer",
        "sgd",
        "--momentum",
        "0.9",
        "--decay-toward",
        "original",
    ];
    resumed_run_is_the_straight_run("llama_untied", &sgd);
}

#[test]
fn activations_computed_again_change_nothing() {
    let case = Case::open("llama_tied");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let data = path("batches.jsonl");
    case.write_batches(&data);
    run(&train_args(&case, &data, &path("kept"))).ok();
    let thrifty = with(train_args(&case, &data, &path("thrifty")), args!["--recompute"]);
    run(&thrifty).ok();
    let rows = |dir: &str| fs::read(path(dir).join("adapter_model.safetensors")).unwrap();
    assert!(rows("kept") == rows("thrifty"));
}

#[test]
fn saves_on_the_way_change_nothing_and_leave_one_adapter() {
    let case = Case::open("llama_untied");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let data = path("batches.jsonl");
    case.write_batches(&data);
    run(&train_args(&case, &data, &path("plain"))).ok();
    let saving = with(
        train_args(&case, &data, &path("saving")),
        args!["--save-every", "3"],
    );
    run(&saving).ok();
    let files = |dir: &str| {
        let names = snapshot(&path(dir)).into_iter();
        let names = names.map(|(path, content)| (path.file_name().unwrap().to_owned(), content));
        names.collect::<std::collections::BTreeMap<_, _>>()
    };
    let (mut plain, mut saving) = (files("plain"), files("saving"));
    assert!(
        saving
            .remove(&OsString::from("training_state.safetensors"))
            .is_some()
    );
    // The options differ, of course.
    let options = OsString::from("train_config.toml");
    assert!(plain.remove(&options).is_some() && saving.remove(&options).is_some());
    assert!(plain == saving);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

//! What holds for every command: what goes where, exit statuses, and what may be overwritten.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::{
    COMMANDS, PROGRAM, Run, WITH_OUTPUT, Workspace, args, edit_json, fixture, floats_of, read_json,
    read_json_lines, read_tensors, run, snapshot, trains_again,
};

#[test]
fn every_command_prints_one_json_object_or_text() {
    for name in COMMANDS {
        let workspace = Workspace::new();
        let fields: &[&str] = match name {
            "train" => &["adapter", "loss_after", "steps"],
            "eval" => &["loss", "perplexity", "tokens"],
            "forward" => &["embeddings", "logits", "out"],
            "generate" => &["prompt", "text", "token_ids", "new_tokens", "tokens_per_second"],
            "init" => &["adapter", "token_indices", "tokens"],
            "merge" => &["out", "rewritten", "rows"],
            "verify" => &["checks", "fits"],
            "extract" => &[
                "adapter",
                "embedding_dim",
                "modules",
                "token_indices",
                "tokens",
                "vocab_size",
            ],
            "diff" => &["equal", "kind", "tables", "tensors"],
            _ => &["kind"],
        };
        let report = run(&workspace.command_with(name, &["--json"])).ok().json();
        for field in fields {
            assert!(report.get(field).is_some(), "{name}: no {field} in {report}");
        }
        let mut before = args!["--json", "--force"];
        before.extend(workspace.command(name));
        let again = run(&before).ok().json();
        assert_eq!(
            again.as_object().unwrap().keys().collect::<Vec<_>>(),
            report.as_object().unwrap().keys().collect::<Vec<_>>(),
            "{name}: options before the command"
        );
        let text = run(&workspace.command_with(name, &["--force"])).ok();
        assert!(text.stdout.ends_with('\n') && text.stdout.len() > 1, "{text:#?}");
        assert!(!text.stdout.starts_with('{'), "{text:#?}");
    }
}

#[test]
fn eval_needs_no_adapter_and_forward_neither() {
    let workspace = Workspace::new();
    let (model, data, ids, out) = (
        workspace.model(),
        workspace.data(),
        workspace.ids(),
        workspace.out(),
    );
    let base = run(&args!["eval", "--json", "--model", model, "--data", data])
        .ok()
        .json();
    let adapted = run(&workspace.command_with("eval", &["--json"])).ok().json();
    assert_ne!(base["loss"], adapted["loss"]);
    assert_eq!(base["tokens"], json!(10));
    run(&args![
        "forward",
        "--model",
        model,
        "--input-ids",
        ids,
        "--out",
        out
    ])
    .ok();
}

#[test]
fn a_longer_run_shows_no_bar_and_evaluates_where_asked() {
    let workspace = Workspace::new();
    let (data, metrics) = (workspace.data(), workspace.path("metrics.jsonl"));
    let mut args = workspace.command("train");
    args.extend(args![
        "--steps",
        "6",
        "--eval-data",
        data,
        "--eval-every",
        "2",
        "--metrics",
        metrics,
        "--json"
    ]);
    let summary = run(&args).ok().json();
    let lines = read_json_lines(&metrics);
    assert_eq!(lines.len(), 7);
    let evaluated: Vec<bool> = lines[..6]
        .iter()
        .map(|line| line.get("eval_loss").is_some_and(Value::is_number))
        .collect();
    assert_eq!(evaluated, [false, true, false, true, false, true]);
    // The evaluation of the last step is that of the adapter which was written.
    assert_eq!(summary["loss_of"], "held-out data");
    assert_eq!(summary["loss_after"], lines[5]["eval_loss"]);
    let (model, adapter) = (workspace.model(), workspace.out());
    let eval = args![
        "eval",
        "--json",
        "--model",
        model,
        "--adapter",
        adapter,
        "--data",
        data,
        "--batch-size",
        "2"
    ];
    let loss = run(&eval).ok().json()["loss"].as_f64().unwrap();
    assert!((loss - summary["loss_after"].as_f64().unwrap()).abs() < 1e-9);
    assert!(loss < summary["loss_before"].as_f64().unwrap());
}

#[test]
fn wrong_usage_ends_with_status_2() {
    let workspace = Workspace::new();
    let before = workspace.snapshot();
    let (model, data, out) = (workspace.model(), workspace.data(), workspace.out());
    run(&args![]).misused(&["Commands:"]);
    run(&args!["trian"]).misused(&["trian", "train"]);
    for name in COMMANDS {
        run(&workspace.command_with(name, &["--no-such-option"])).misused(&["--no-such-option"]);
        let command = workspace.command(name)[0].clone();
        run(std::slice::from_ref(&command)).misused(&["required"]);
        run(&[workspace.command(name), args!["one-too-many", "two-too-many"]].concat())
            .misused(&["too-many"]);
    }
    for name in COMMANDS {
        let args = workspace.command(name);
        // Each of these commands' options, valued, is required, but for an adapter.
        for at in (1..args.len()).filter(|at| {
            let arg = args[*at].to_string_lossy();
            arg.starts_with("--")
                && arg != "--batch-size"
                && (arg != "--adapter" || matches!(name, "merge" | "verify"))
                && !name.starts_with("inspect")
        }) {
            let less = [&args[..at], &args[at + 2..]].concat();
            run(&less).misused(&[&args[at].to_string_lossy()]);
            run(&args[..=at]).misused(&[&args[at].to_string_lossy()]);
        }
    }
    for command in ["train", "init"] {
        let mut args = args![command, "--model", model, "--out", out];
        if command == "train" {
            args.extend(args!["--data", data]);
        }
        run(&args).misused(&["--tokens", "--token-ids"]);
        let both = [args.clone(), args!["--tokens", "the", "--token-ids", "5"]].concat();
        run(&both).misused(&["--tokens", "--token-ids", "cannot be used with"]);
        for ids in [
            "",
            "a",
            "1,,2",
            "1,",
            "5-2",
            "1.5",
            "-1",
            "4294967296",
            "1-2-3",
            "0x10",
            "1 2",
        ] {
            let wrong = [args.clone(), vec![OsString::from(format!("--token-ids={ids}"))]].concat();
            run(&wrong).misused(&["--token-ids"]);
        }
    }
    for more in [
        "--batch-size=0",
        "--batch-size=-1",
        "--batch-size=1.5",
        "--batch-size=many",
        "--steps=0",
        "--steps=-1",
        "--save-every=0",
        "--max-length=0",
        "--optimizer=rmsprop",
        "--schedule=square",
        "--decay-toward=infinity",
        "--dtype=f64",
        "--device=tpu",
        "--device=cuda:",
        "--device=cuda:x",
        "--lr=fast",
        "--seed=-1",
        "--warmup-steps=-1",
        "--padding-idx=maybe",
        // It needs --eval-data.
        "--eval-every=5",
    ] {
        let name = more.split('=').next().unwrap();
        run(&workspace.command_with("train", &[more])).misused(&[name]);
    }
    run(&workspace.command_with("eval", &["--batch-size=0"])).misused(&["--batch-size"]);
    run(&workspace.command_with("forward", &["--dtype=int8"])).misused(&["--dtype"]);
    workspace.unchanged(&before, &[]);
}

#[test]
fn help_and_version_succeed() {
    let version = run(&args!["--version"]).ok();
    assert_eq!(
        version.stdout,
        concat!("trainable-tokens ", env!("CARGO_PKG_VERSION"), "\n")
    );
    let help = run(&args!["--help"]).ok();
    for command in [
        "demo",
        "train",
        "eval",
        "forward",
        "generate",
        "init",
        "add-tokens",
        "merge",
        "extract",
        "diff",
        "split",
        "inspect",
        "verify",
        "plot",
        "completions",
        "man",
    ] {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{help:#?}");
        let own = run(&args![command, "--help"]).ok();
        assert!(own.stdout.contains("Usage: trainable-tokens "), "{own:#?}");
        assert!(own.stdout.contains("--json"), "{own:#?}");
        run(&args![command, "--version"]).ok();
    }
}

#[test]
fn what_exists_is_replaced_only_by_force() {
    for name in WITH_OUTPUT {
        let workspace = Workspace::new();
        let out = workspace.out();
        let shown = out.to_string_lossy().into_owned();
        run(&workspace.command(name)).ok();
        workspace.refuses(&workspace.command(name), &[&shown, "already exists", "--force"]);
        let fresh = workspace.snapshot();

        // Something else of the same kind is replaced as a whole.
        if name == "forward" {
            fs::write(&out, "old").unwrap();
        } else {
            fs::remove_dir_all(&out).unwrap();
            support::copy_dir(&fixture("llama_tied/adapter"), &out);
            fs::write(out.join("more.txt"), "old").unwrap();
        }
        workspace.refuses(&workspace.command(name), &[&shown, "already exists", "--force"]);
        run(&workspace.command_with(name, &["--force"])).ok();
        workspace.unchanged(&fresh, &workspace.command(name));
    }
}

#[test]
fn an_output_of_another_kind_is_not_replaced_even_by_force() {
    for name in WITH_OUTPUT {
        let workspace = Workspace::new();
        let out = workspace.out();
        let shown = out.to_string_lossy().into_owned();
        if name == "forward" {
            fs::create_dir(&out).unwrap();
            fs::write(out.join("precious.txt"), "x").unwrap();
        } else {
            fs::write(&out, "precious").unwrap();
        }
        workspace.refuses(&workspace.command_with(name, &["--force"]), &[&shown]);
        if name != "forward" {
            fs::remove_file(&out).unwrap();
            fs::create_dir(&out).unwrap();
            fs::write(out.join("precious.txt"), "x").unwrap();
            workspace.refuses(&workspace.command_with(name, &["--force"]), &[&shown]);
        }
    }
}

#[test]
fn a_model_is_not_replaced_by_an_adapter_made_from_it() {
    for name in ["train", "init", "merge"] {
        let workspace = Workspace::new();
        let model = workspace.model();
        let within = workspace.path("all");
        fs::create_dir(&within).unwrap();
        for out in [model.clone(), model.join(".")] {
            let mut args = workspace.command_with(name, &["--force"]);
            let at = args.iter().position(|arg| arg == "--out").unwrap();
            args[at + 1] = out.clone().into();
            workspace.refuses(&args, &[&model.to_string_lossy()]);
        }
        // Nor by what lies around it.
        let around = workspace.path("around");
        fs::create_dir(&around).unwrap();
        fs::write(around.join("config.json"), "{}").unwrap();
        fs::rename(&model, around.join("model")).unwrap();
        let mut args = workspace.command_with(name, &["--force"]);
        for (option, value) in [("--model", around.join("model")), ("--out", around.clone())] {
            let at = args.iter().position(|arg| arg == option).unwrap();
            args[at + 1] = value.into();
        }
        workspace.refuses(&args, &[&around.to_string_lossy()]);
    }
}

#[test]
fn metrics_are_replaced_only_by_force() {
    let workspace = Workspace::new();
    let metrics = workspace.path("metrics.jsonl");
    fs::write(&metrics, "old\n").unwrap();
    let shown = metrics.to_string_lossy().into_owned();
    let args = workspace.command_with("train", &["--metrics", &shown]);
    workspace.refuses(&args, &[&shown, "already exists", "--force"]);
    run(&[args, args!["--force"]].concat()).ok();
    assert_eq!(read_json_lines(&metrics).len(), 2);

    // Metrics inside the directory that is written would go with it.
    let out = workspace.out();
    let inside = out.join("metrics.jsonl").to_string_lossy().into_owned();
    let args = workspace.command_with("train", &["--force", "--metrics", &inside]);
    workspace.refuses(&args, &[&inside]);
    let args = workspace.command_with(
        "train",
        &["--resume", &out.to_string_lossy(), "--metrics", &inside],
    );
    workspace.refuses(&args, &[&inside]);
}

/// Runs with standard output somewhere.
fn run_into(stdout: Stdio, args: &[OsString]) -> Run {
    let mut command = Command::new(PROGRAM);
    let child = command
        .args(args)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped());
    Run::of(args, &child.spawn().unwrap().wait_with_output().unwrap())
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_standard_output_is_an_error() {
    for name in COMMANDS {
        for json in [false, true] {
            let workspace = Workspace::new();
            let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
            let mut args = workspace.command(name);
            args.extend(json.then(|| OsString::from("--json")));
            run_into(full.into(), &args).refused(&["standard output"]);
        }
    }
}

#[test]
fn a_reader_that_left_is_no_error() {
    for name in COMMANDS {
        let workspace = Workspace::new();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        run_into(writer.into(), &workspace.command(name)).ok();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_standard_error_leaves_the_status() {
    let workspace = Workspace::new();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let args = args!["inspect", workspace.path("nothing")];
    let status = Command::new(PROGRAM).args(&args).stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn tokens_are_named_by_strings() {
    let tokens = |workspace: &Workspace, command: &str, strings: &str| {
        let mut args = workspace.command_with(command, &["--json"]);
        let at = args.iter().position(|arg| arg == "--token-ids").unwrap();
        args[at] = "--tokens".into();
        args[at + 1] = strings.into();
        args
    };
    let workspace = Workspace::new();
    let report = run(&tokens(&workspace, "init", "<think>,the,</think>,<unk>"))
        .ok()
        .json();
    assert_eq!(report["token_indices"], json!([297, 166, 298, 0]));
    assert_eq!(report["tokens"], json!(["<think>", "the", "</think>", "<unk>"]));
    let config = read_json(&workspace.out().join("adapter_config.json"));
    assert_eq!(config["token_indices"], json!([297, 166, 298, 0]));
    fs::remove_dir_all(workspace.out()).unwrap();
    run(&tokens(&workspace, "train", "<answer>,bor")).ok();
    let config = read_json(&workspace.out().join("adapter_config.json"));
    assert_eq!(config["token_indices"], json!([299, 12]));
    fs::remove_dir_all(workspace.out()).unwrap();

    for command in ["init", "train"] {
        let refuses = |strings: &str, parts: &[&str]| {
            workspace.refuses(&tokens(&workspace, command, strings), parts);
        };
        refuses(
            "the,<think><answer>",
            &[
                "'<think><answer>'",
                "2 ids",
                "297 ('<think>')",
                "299 ('<answer>')",
            ],
        );
        refuses("the cat", &["'the cat'", "166 ('the')", "167 ('cat')"]);
        refuses(
            "the,quick",
            &["'quick'", "unknown", "0 ('<unk>')", "`add-tokens`"],
        );
        refuses("", &["''", "nothing"]);
        refuses("the,,cat", &["''", "nothing", r"'\,'"]);
        refuses("the,cat,the", &["166", "twice"]);
    }
}

#[test]
fn a_comma_inside_a_token_is_escaped() {
    let workspace = Workspace::new();
    let model = workspace.path("commas");
    run(&args![
        "add-tokens",
        "--model",
        workspace.model(),
        "--tokens",
        r"<a\,b>,<c>",
        "--tokens",
        r"<\,>",
        "--init-token",
        "<a,b>=copy:,",
        "--out",
        model
    ])
    .ok();
    let train = |out: &str, more: &[&str]| {
        let data = workspace.data();
        let mut args = args![
            "train",
            "--model",
            model,
            "--data",
            data,
            "--out",
            workspace.path(out)
        ];
        args.extend(more.iter().map(OsString::from));
        args
    };
    let named = ["--tokens", r"the,\,", "--tokens", r"<a\,b>,<\,>"];
    let rates = ["--token-lr", r"\,=0,<a\,b>=0.5", "--init-token", "<,>=copy:the"];
    run(&train("out", &[named, rates].concat())).ok();
    let config = read_json(&workspace.out().join("adapter_config.json"));
    assert_eq!(config["token_indices"], json!([166, 161, 300, 302]));

    // Lists of a file hold the strings themselves.
    let file = workspace.out().join("train_config.toml");
    let text = fs::read_to_string(&file).unwrap();
    for line in [
        r#"tokens = ["the", ",", "<a,b>", "<,>"]"#,
        r#"token-lr = [",=0", "<a,b>=0.5"]"#,
        r#"init-token = ["<,>=copy:the"]"#,
    ] {
        assert!(text.lines().any(|other| other == line), "no {line} in {text}");
    }
    trains_again(&workspace.out(), &workspace.path("again"));

    // Without a backslash it separates.
    workspace.refuses(&train("new", &["--tokens", "the,<a,b>"]), &["'<a'", "2 ids"]);
    let more = ["--tokens", r"the,<x\,y>"];
    workspace.refuses(&train("new", &more), &["'<x,y>'"]);
    let more = [&named[..], &["--token-lr", r"<x\,y>=1"]].concat();
    workspace.refuses(&train("new", &more), &["'<x,y>'"]);
    let file = workspace.path("tokens.toml");
    fs::write(&file, "\ntokens = [\"the\", \"<x,y>\"]\n").unwrap();
    workspace.refuses(
        &[train("new", &[]), args!["--config", file]].concat(),
        &["'<x,y>'"],
    );
}

#[test]
fn ids_and_ranges_keep_their_order() {
    let workspace = Workspace::new();
    let init = |ids: &str| {
        let mut args = workspace.command_with("init", &["--json", "--force"]);
        let at = args.iter().position(|arg| arg == "--token-ids").unwrap();
        args[at + 1] = ids.into();
        run(&args).ok().json()["token_indices"].clone()
    };
    assert_eq!(init("299,7, 40-43,0"), json!([299, 7, 40, 41, 42, 43, 0]));
    assert_eq!(init("12-12"), json!([12]));
    let all: Vec<u32> = (0..300).collect();
    assert_eq!(init("0-299"), json!(all));
}

#[test]
fn the_padding_token_trains_only_if_told_how() {
    let workspace = Workspace::new();
    fs::write(workspace.data(), "{\"input_ids\": [5, 3, 12, 3, 7, 12, 9]}\n").unwrap();
    let train = |more: &[&str]| {
        let mut args = workspace.command_with("train", &["--json", "--force"]);
        let at = args.iter().position(|arg| arg == "--token-ids").unwrap();
        args[at + 1] = "3,12".into();
        args.extend(more.iter().map(OsString::from));
        args
    };
    workspace.refuses(&train(&[]), &["3", "padding token", "--padding-idx"]);
    let told = run(&train(&["--padding-idx", "torch"]));
    assert_eq!(
        (told.code, told.stderr.lines().count()),
        (Some(0), 1),
        "{told:#?}"
    );
    assert!(told.stderr.contains("token id 3"), "{told:#?}");
    told.json();
    // The head is not tied, so that torch's rule leaves the padding token's row, which is first, as it was.
    let moved = || {
        let read = |file: PathBuf, name: &str| floats_of(&read_tensors(&file), name);
        let rows = read(
            workspace.out().join("adapter_model.safetensors"),
            "base_model.model.model.embed_tokens.trainable_tokens_delta",
        );
        let table = read(
            workspace.model().join("model.safetensors"),
            "model.embed_tokens.weight",
        );
        let dim = rows.len() / 2;
        [(0, 3), (1, 12)].map(|(slot, id)| rows[slot * dim..][..dim] != table[id * dim..][..dim])
    };
    assert_eq!(moved(), [false, true]);
    run(&train(&["--padding-idx", "train"])).ok().json();
    assert_eq!(moved(), [true, true]);
}

#[test]
fn verbose_adds_the_causes() {
    let workspace = Workspace::new();
    fs::remove_file(workspace.data()).unwrap();
    let run = run(&workspace.command_with("eval", &["--verbose"]));
    assert_eq!(run.code, Some(1), "{run:#?}");
    let mut lines = run.stderr.lines();
    assert!(lines.next().unwrap().starts_with("error: "), "{run:#?}");
    let causes: Vec<&str> = lines.collect();
    assert!(!causes.is_empty(), "{run:#?}");
    assert!(
        causes.iter().all(|line| line.starts_with("  caused by: ")),
        "{run:#?}"
    );
}

#[test]
fn verify_tells_what_does_not_fit() {
    let workspace = Workspace::new();
    // An adapter that records tokens and digest, and then a model with another table and other strings.
    run(&workspace.command("init")).ok();
    let adapter = workspace.out();
    let args = args![
        "verify",
        "--json",
        "--model",
        workspace.model(),
        "--adapter",
        adapter
    ];
    let before = workspace.snapshot();
    assert_eq!(run(&args).ok().json()["fits"], true);
    workspace.unchanged(&before, &args);
    let outcome = |parts: &[&str], failing: &str| {
        let run = run(&args);
        run.failed(parts);
        let report = run.json();
        assert_eq!(report["fits"], json!(false), "{report}");
        let checks = report["checks"].as_array().unwrap();
        let wrong: Vec<&Value> = checks.iter().filter(|check| check["ok"] == false).collect();
        assert_eq!(wrong.len(), 1, "{report}");
        assert_eq!(wrong[0]["check"], failing, "{report}");
    };
    let tokenizer = workspace.model().join("tokenizer.json");
    let healthy = fs::read(&tokenizer).unwrap();
    edit_json(&tokenizer, |json| {
        json["added_tokens"][6]["content"] = "<reply>".into();
    });
    outcome(&["299", "'<answer>'", "'<reply>'"], "token strings");
    fs::write(&tokenizer, healthy).unwrap();
    assert_eq!(run(&args).ok().json()["fits"], true);

    support::edit_tensors(&workspace.model().join("model.safetensors"), |tensors| {
        let (.., bytes) = tensors.get_mut("model.embed_tokens.weight").unwrap();
        bytes[0] ^= 1;
    });
    outcome(&["sha256:", "model"], "base table");
}

#[test]
fn verify_finds_values_that_are_not_finite() {
    for (case, column) in [("nan_value", "NaN"), ("inf_value", "inf")] {
        let adapter = fixture("malformed").join(case).join("adapter");
        let rows = read_tensors(&adapter.join("adapter_model.safetensors"));
        let (_, shape, _) = rows.values().next().unwrap();
        // A model of the right size for it.
        let workspace = Workspace::new();
        edit_json(&workspace.model().join("config.json"), |config| {
            config["vocab_size"] = json!(21);
            config["hidden_size"] = json!(shape[1]);
        });
        support::edit_tensors(&workspace.model().join("model.safetensors"), |tensors| {
            let (dtype, ..) = tensors["model.embed_tokens.weight"];
            let table = (dtype, vec![21, shape[1]], vec![0; 21 * shape[1] * 4]);
            tensors.insert("emb.weight".to_owned(), table.clone());
            tensors.insert("model.embed_tokens.weight".to_owned(), table);
        });
        let args = args![
            "verify",
            "--json",
            "--model",
            workspace.model(),
            "--adapter",
            adapter
        ];
        let run = run(&args);
        run.failed(&["not finite", "token id"]);
        assert_eq!(run.json()["fits"], json!(false), "{column}");
    }
}

#[test]
fn inputs_are_only_read() {
    let workspace = Workspace::new();
    let before = workspace.snapshot();
    for name in COMMANDS {
        run(&workspace.command(name)).ok();
        let out = workspace.out();
        if out.is_dir() {
            assert!(!snapshot(&out).is_empty());
            fs::remove_dir_all(out).unwrap();
        } else if out.is_file() {
            fs::remove_file(out).unwrap();
        }
        workspace.unchanged(&before, &workspace.command(name));
    }
}

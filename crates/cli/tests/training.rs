//! Options of `train`: early stopping, the best adapter, learning rates of tokens, and files of options.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::json;
use support::{
    Workspace, args, eval, fixture, floats_of, loss, read_json_lines, read_tensors, run, trains_again,
};

const ROWS: &str = "base_model.model.model.embed_tokens.trainable_tokens_delta";

/// A run that gets worse on the data it is evaluated on, for it trains on the opposite.
fn worsening(workspace: &Workspace, more: &[&str]) -> Vec<OsString> {
    let (data, eval) = (workspace.path("train.jsonl"), workspace.path("eval.jsonl"));
    fs::write(
        &data,
        format!("{}\n", json!({"input_ids": [299, 12, 299, 12, 299, 40]})),
    )
    .unwrap();
    fs::write(
        &eval,
        format!("{}\n", json!({"input_ids": [299, 7, 12, 60, 12, 41]})),
    )
    .unwrap();
    let mut args = args![
        "train",
        "--json",
        "--model",
        workspace.model(),
        "--data",
        data,
        "--token-ids",
        "299,12",
        "--lr",
        "0.05",
        "--steps",
        "60",
        "--eval-data",
        eval,
        "--eval-every",
        "2",
        "--metrics",
        workspace.path("metrics.jsonl"),
        "--out",
        workspace.out()
    ];
    args.extend(more.iter().map(OsString::from));
    args
}

/// Steps and losses of the evaluations that a run wrote down.
fn evaluations(workspace: &Workspace) -> Vec<(u64, f64)> {
    let lines = read_json_lines(&workspace.path("metrics.jsonl")).into_iter();
    let evaluated = lines.filter_map(|line| Some((line["step"].as_u64()?, line["eval_loss"].as_f64()?)));
    evaluated.collect()
}

fn eval_loss(workspace: &Workspace) -> f64 {
    let data = workspace.path("eval.jsonl");
    loss(&eval(&workspace.model(), Some(&workspace.out()), &data, &[]))
}

#[test]
fn a_run_ends_early_and_keeps_its_best_adapter() {
    let workspace = Workspace::new();
    let summary = run(&worsening(
        &workspace,
        &["--early-stopping-patience", "3", "--keep-best"],
    ))
    .ok()
    .json();
    let found = evaluations(&workspace);
    // The evaluation before the first step counts too.
    let start = summary["loss_before"].as_f64().unwrap();
    let all: Vec<(u64, f64)> = [(0, start)].into_iter().chain(found).collect();
    let best = all.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let last = all.last().unwrap().0;
    assert!(last < 60, "{all:?}");
    assert_eq!(last, best.0 + 3 * 2, "{all:?}");
    assert_eq!(summary["end"], "early_stopping");
    assert_eq!(
        (&summary["steps"], &summary["kept_step"]),
        (&json!(last), &json!(best.0))
    );
    assert_eq!(
        (&summary["best_step"], &summary["best_eval_loss"]),
        (&json!(best.0), &json!(best.1))
    );
    assert_eq!(summary["loss_after"], json!(best.1));
    assert!((eval_loss(&workspace) - best.1).abs() < 1e-9);
    assert!(!workspace.out().join("best").exists());

    // Without, the last rows stay.
    let more = ["--early-stopping-patience", "3", "--force"];
    let plain = run(&worsening(&workspace, &more)).ok().json();
    assert_eq!(
        (&plain["steps"], &plain["kept_step"]),
        (&json!(last), &json!(last))
    );
    assert_eq!(plain["best_step"], json!(best.0));
    assert!(eval_loss(&workspace) > best.1);

    // Nothing improves by so much.
    let more = [
        "--early-stopping-patience",
        "2",
        "--early-stopping-min-delta",
        "100",
        "--force",
    ];
    let short = run(&worsening(&workspace, &more)).ok().json();
    assert_eq!(
        (&short["end"], &short["steps"]),
        (&json!("early_stopping"), &json!(4))
    );
}

#[test]
fn the_best_of_a_run_may_be_its_last_or_its_start() {
    let workspace = Workspace::new();
    let args = worsening(&workspace, &["--keep-best"]);
    fs::copy(workspace.path("train.jsonl"), workspace.path("eval.jsonl")).unwrap();
    let better = run(&args).ok().json();
    assert_eq!(
        (&better["end"], &better["kept_step"]),
        (&json!("last_step"), &json!(60))
    );

    // Rows that only get worse are those that it began with.
    let mut args = worsening(&workspace, &["--keep-best", "--force"]);
    let at = args.iter().position(|arg| arg == "--eval-every").unwrap();
    args[at + 1] = "60".into();
    let start = run(&args).ok().json();
    assert_eq!(
        (&start["kept_step"], &start["loss_after"]),
        (&json!(0), &start["loss_before"])
    );
    let rows = floats_of(
        &read_tensors(&workspace.out().join("adapter_model.safetensors")),
        ROWS,
    );
    let init = workspace.path("init");
    run(&args![
        "init",
        "--model",
        workspace.model(),
        "--token-ids",
        "299,12",
        "--out",
        init
    ])
    .ok();
    assert_eq!(
        rows,
        floats_of(&read_tensors(&init.join("adapter_model.safetensors")), ROWS)
    );
}

#[test]
fn what_decides_by_evaluations_needs_them() {
    let workspace = Workspace::new();
    for (more, needs) in [
        (&["--keep-best"][..], "--eval-data"),
        (&["--early-stopping-patience", "3"], "--eval-every"),
        (
            &["--early-stopping-min-delta", "0.1"],
            "--early-stopping-patience",
        ),
    ] {
        run(&workspace.command_with("train", more)).misused(&[needs]);
    }
    run(&worsening(&workspace, &["--early-stopping-patience", "0"])).misused(&["--early-stopping-patience"]);
    let more = ["--early-stopping-patience=1", "--early-stopping-min-delta=-1"];
    run(&worsening(&workspace, &more)).refused(&["early-stopping-min-delta is -1"]);
}

#[test]
fn tokens_have_learning_rates_by_string_or_id() {
    let workspace = Workspace::new();
    let rows = |more: &[&str]| {
        run(&workspace.command_with("train", &[&["--steps", "3", "--force"], more].concat())).ok();
        floats_of(
            &read_tensors(&workspace.out().join("adapter_model.safetensors")),
            ROWS,
        )
    };
    let plain = rows(&[]);
    let frozen = rows(&["--token-lr", "12=0", "--weight-decay", "0.5"]);
    let both = rows(&["--token-lr", "12=0,299=0.5"]);
    let dim = plain.len() / 2;
    let start = {
        let init = workspace.path("init");
        run(&args![
            "init",
            "--model",
            workspace.model(),
            "--token-ids",
            "299,12",
            "--out",
            init
        ])
        .ok();
        floats_of(&read_tensors(&init.join("adapter_model.safetensors")), ROWS)
    };
    assert_eq!(frozen[dim..], start[dim..]);
    assert_eq!(both[dim..], start[dim..]);
    assert_ne!(frozen[..dim], start[..dim]);
    assert_ne!(both[..dim], plain[..dim]);
    let refused = |value: &str, parts: &[&str]| {
        run(&workspace.command_with("train", &["--force", "--token-lr", value])).refused(parts);
    };
    refused("7=0.1", &["token id 7", "does not train"]);
    refused("12=0,299=0", &["nothing trains"]);
    refused("12=0,12=1", &["token id 12", "two learning rates"]);
    refused("no such token=1", &["no such token"]);
    run(&workspace.command_with("train", &["--force", "--token-lr", "12"])).misused(&["TOKEN=LR"]);
}

#[test]
fn options_of_a_run_give_the_run_again() {
    let workspace = Workspace::new();
    let more = [
        "--steps",
        "4",
        "--lr=1e-2",
        "--shuffle",
        "--accumulate=2",
        "--token-lr=12=5e-3",
        "--schedule=cosine",
        "--warmup-steps",
        "1",
        "--max-grad-norm",
        "1",
        "--lora-rank",
        "2",
        "--lora-targets=q_proj,up_proj",
        "--init-token",
        "12=mean",
        "--init-token",
        "299=random:0.1+seed:4",
        "--match-norm=original",
    ];
    run(&workspace.command_with("train", &more)).ok();
    let config = workspace.out().join("train_config.toml");
    let again = workspace.path("again");
    trains_again(&workspace.out(), &again);
    // The options are the same but for where the adapter is.
    let text = |dir: &Path| fs::read_to_string(dir.join("train_config.toml")).unwrap();
    let (first, second) = (text(&workspace.out()), text(&again));
    let differ: Vec<(&str, &str)> = first
        .lines()
        .zip(second.lines())
        .filter(|(a, b)| a != b)
        .collect();
    assert!(
        differ.len() == 1 && differ[0].0.starts_with("out = "),
        "{differ:?}"
    );
    assert_eq!(first.lines().count(), second.lines().count());
    // In the same place too.
    run(&args!["train", "--force", "--config", config]).ok();
    assert_eq!(text(&workspace.out()), first);
    // And what the command line says wins: lists, tokens under another name, switches that are on in the file.
    let other = workspace.path("other");
    run(&args![
        "train",
        "--config",
        config,
        "--out",
        other,
        "--tokens",
        "a",
        "--shuffle=false",
        "--token-lr",
        "",
    ])
    .misused(&["--token-lr"]);
    run(&args![
        "train",
        "--config",
        config,
        "--out",
        other,
        "--token-ids",
        "7",
        "--shuffle=false",
        "--token-lr",
        "7=1",
        "--init-token",
        "7=copy:12",
        "--match-norm",
        "mean",
        "--max-row-norm",
        "3",
        "--init",
        "mean",
    ])
    .ok();
    let text = text(&other);
    for line in [
        "token-ids = \"7\"",
        "shuffle = false",
        "token-lr = [\"7=1\"]",
        "max-row-norm = 3.0",
        "lr = 0.01",
    ] {
        assert!(text.lines().any(|other| other == line), "no {line} in {text}");
    }
}

#[test]
fn several_files_of_data_are_as_one() {
    let workspace = Workspace::new();
    let lines = [
        [1, 299, 12, 40],
        [7, 298, 299, 12],
        [12, 5, 299, 7],
        [299, 2, 12, 9],
    ];
    let lines = lines.map(|ids| format!("{}\n", json!({"input_ids": ids})));
    let write = |name: &str, lines: &[String]| {
        let path = workspace.path(name);
        fs::write(&path, lines.concat()).unwrap();
        path
    };
    let first = write("first.jsonl", &lines[..1]);
    let second = write("second.jsonl", &lines[1..]);
    let whole = write("whole.jsonl", &lines);
    // An option for each file.
    let given = |option: &str, files: &[&Path]| {
        files
            .iter()
            .flat_map(|file| args![option, file])
            .collect::<Vec<_>>()
    };
    let train = |out: &str, files: &[&Path], more: &[&str]| {
        let (model, out) = (workspace.model(), workspace.path(out));
        let start = args!["train", "--json", "--model", model, "--out", out];
        let rest = ["--token-ids", "299,12", "--batch-size", "2"].iter().chain(more);
        [start, given("--data", files), rest.map(OsString::from).collect()].concat()
    };
    let weights = |out: &str| fs::read(workspace.path(out).join("adapter_model.safetensors")).unwrap();
    let held_out = |files: &[&Path]| given("--eval-data", files);
    let of_one = run(&[train("one", &[&whole], &[]), held_out(&[&whole])].concat());
    let of_two = run(&[
        train("two", &[&first, &second], &[]),
        held_out(&[&first, &second]),
    ]
    .concat());
    assert!(weights("one") == weights("two"));
    assert_eq!(of_one.ok().json()["loss_after"], of_two.ok().json()["loss_after"]);
    let shuffled = ["--shuffle", "--steps=5"];
    run(&train("one shuffled", &[&whole], &shuffled)).ok();
    run(&train("two shuffled", &[&first, &second], &shuffled)).ok();
    assert!(weights("one shuffled") == weights("two shuffled"));
    assert!(weights("one") != weights("one shuffled"));
    let twice = eval(
        &workspace.model(),
        None,
        &first,
        &["--data", second.to_str().unwrap()],
    );
    assert_eq!(twice, eval(&workspace.model(), None, &whole, &[]));

    // The files are a list in the options of the run, and give it again.
    let config = workspace.path("two").join("train_config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let list = format!("data = [{first:?}, {second:?}]");
    for line in [&list, &format!("eval-{list}")] {
        assert!(text.lines().any(|other| other == line), "no {line} in {text}");
    }
    trains_again(&workspace.path("two"), &workspace.path("again"));
    // A file on the command line takes the place of all of them.
    let other = workspace.path("other");
    let args = args!["train", "--config", config, "--out", other, "--data", whole];
    run(&args).ok();
    let text = fs::read_to_string(other.join("train_config.toml")).unwrap();
    assert!(text.contains(&format!("\ndata = [{whole:?}]\n")), "{text}");

    // A run goes on with the same examples in the same order, however they are cut into files.
    run(&train(
        "part",
        &[&first, &second],
        &["--steps=2", "--save-every=1"],
    ))
    .ok();
    let part = workspace.path("part").to_string_lossy().into_owned();
    let rest = ["--steps=5", "--resume", &part];
    run(&train("resumed", &[&whole], &rest)).ok();
    run(&train("straight", &[&whole], &["--steps=5"])).ok();
    assert!(weights("resumed") == weights("straight"));
    workspace.refuses(
        &train("swapped", &[&second, &first], &rest),
        &["in another order"],
    );

    run(&train("none", &[], &[])).misused(&["--data"]);
    let missing = workspace.path("missing.jsonl");
    workspace.refuses(&train("none", &[&first, &missing], &[]), &["missing.jsonl"]);
    // What is written must not take the place of any of them.
    fs::create_dir(workspace.path("held")).unwrap();
    let inside = write("held/second.jsonl", &lines[1..]);
    workspace.refuses(
        &train("held", &[&first, &inside], &["--force"]),
        &["held", "second.jsonl"],
    );
}

#[test]
fn files_of_options_are_read_strictly() {
    let workspace = Workspace::new();
    let config = workspace.path("train.toml");
    let shown = config.to_string_lossy().into_owned();
    let command = [workspace.command("train"), args!["--config", config]].concat();
    let written = |text: &str| fs::write(&config, text).unwrap();
    for (text, parts) in [
        (
            "steps = 3\nbatchsize = 4\n",
            &["line 2", "batchsize", "batch-size"][..],
        ),
        (
            "\n\nlearning_rate = 4\n",
            &["line 3", "learning-rate", "unknown key"],
        ),
        ("config = \"a\"", &["line 1", "unknown key 'config'"]),
        ("resume = \"a\"", &["line 1", "unknown key 'resume'"]),
        ("json = true", &["line 1", "unknown key 'json'"]),
        ("steps = 3\nlr = \"fast\"", &["line 2", "--lr", "fast"]),
        ("steps = 0", &["line 1", "--steps"]),
        ("steps = 1.5", &["line 1", "--steps"]),
        ("optimizer = \"rmsprop\"", &["line 1", "rmsprop", "--optimizer"]),
        ("shuffle = 1", &["line 1", "shuffle must be true or false"]),
        ("lr = true", &["line 1", "lr is neither true nor false"]),
        ("lr = [1, 2]", &["line 1", "lr takes one value"]),
        ("[lr]\na = 1", &["line 1", "lr must be"]),
        ("warmup-steps = 3\nwarmup_steps = 4", &["line 2", "given twice"]),
        ("steps = 3\nsteps = 4", &["line 2", "duplicate"]),
        ("steps = \n", &["line 1"]),
        ("target-modules = [\"a,b\"]", &["line 1", "'a,b'"]),
    ] {
        written(text);
        workspace.refuses(&command, &[&[shown.as_str()][..], parts].concat());
    }
    fs::remove_file(&config).unwrap();
    run(&command).refused(&[&shown, "cannot read"]);
    run(&[workspace.command("train"), args!["--config"]].concat()).misused(&["--config"]);
    // No other command takes one.
    run(&[workspace.command("eval"), args!["--config", config]].concat()).misused(&["--config"]);

    // Required options may be in the file, under either spelling; where the command line chooses tokens, the file does not.
    let all = workspace.command("train");
    let value = |name: &str| {
        let at = all.iter().position(|arg| arg == name).unwrap();
        all[at + 1].to_string_lossy().into_owned()
    };
    written(&format!(
        "model = {:?}\ndata = {:?}\ntokens = [\"no\", \"such\"]\nbatch_size = 2\nshuffle = false\nsteps = 2\n",
        value("--model"),
        value("--data")
    ));
    let args = args![
        "--force",
        "train",
        "--config",
        config,
        "--out",
        workspace.out(),
        "--json"
    ];
    run(&args).refused(&["no"]);
    let summary = run(&[args, args!["--token-ids", "299,12"]].concat()).ok().json();
    assert_eq!(summary["steps"], 2);
}

#[test]
fn a_run_that_diverges_says_where_and_keeps_what_was_saved() {
    let workspace = Workspace::new();
    let model = fixture("llama_tied/base");
    let line = |i: u32| {
        format!(
            "{}\n",
            json!({"input_ids": [1, 7 * i + 4, 12, 40, 3 * i + 9, 12]})
        )
    };
    fs::write(workspace.data(), (0..12).map(line).collect::<String>()).unwrap();
    let train = |steps: &str, lr: &str| {
        run(&args![
            "train",
            "--model",
            model,
            "--data",
            workspace.data(),
            "--token-ids",
            "12,279",
            "--out",
            workspace.out(),
            "--optimizer",
            "sgd",
            "--save-every",
            "1",
            "--batch-size",
            "2",
            "--accumulate",
            "2",
            "--steps",
            steps,
            "--lr",
            lr,
            "--metrics",
            workspace.path("metrics.jsonl"),
            "--force",
        ])
    };
    let rows = || fs::read(workspace.out().join("adapter_model.safetensors")).unwrap();
    // The logits of rows of this length have a finite loss, and then none.
    for (lr, what) in [
        ("1e36", "the gradient is not finite at step 2"),
        ("1e38", "the loss is NaN at step 2"),
    ] {
        let failed = train("40", lr);
        failed.failed(&[
            what,
            "lines 5, 6",
            "lower the learning rate",
            "after step 1 is in",
        ]);
        assert_eq!(read_json_lines(&workspace.path("metrics.jsonl")).len(), 1);
        let kept = rows();
        train("1", lr).ok();
        assert!(kept == rows(), "at {lr}");
    }
}

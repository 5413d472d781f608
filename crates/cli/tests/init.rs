//! How rows start: every mode from the command line, against the table of the demo's model.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;

use serde_json::{Value, json};
use support::{Workspace, args, demo, floats_of, read_json, read_tensors, run, snapshot};

const DIM: usize = 128;
const KEY: &str = "base_model.model.model.embed_tokens.trainable_tokens_delta";
const TIED_KEY: &str = "base_model.model.lm_head.trainable_tokens_delta";
const DAX: u32 = 963;
const WUG: u32 = 964;

/// The table of the demo's model, which is BF16, exactly.
fn table() -> Vec<Vec<f64>> {
    let tensors = read_tensors(&demo("model/model.safetensors"));
    let (dtype, shape, bytes) = &tensors["model.embed_tokens.weight"];
    assert_eq!(
        (*dtype, shape.as_slice()),
        (safetensors::Dtype::BF16, &[965, DIM][..])
    );
    let values = bytes.chunks_exact(2).map(|bytes| {
        let high = u32::from(u16::from_le_bytes(bytes.try_into().unwrap()));
        f64::from(f32::from_bits(high << 16))
    });
    values
        .collect::<Vec<_>>()
        .chunks(DIM)
        .map(<[f64]>::to_vec)
        .collect()
}

fn init(workspace: &Workspace, tokens: &str, more: &[&str]) -> Vec<OsString> {
    let mut args = args![
        "init",
        "--force",
        "--model",
        demo("model"),
        "--tokens",
        tokens,
        "--out",
        workspace.out()
    ];
    args.extend(more.iter().map(OsString::from));
    args
}

fn train(workspace: &Workspace, out: &str, steps: u32, more: &[&str]) -> Vec<OsString> {
    let mut args = args![
        "train",
        "--json",
        "--force",
        "--model",
        demo("model"),
        "--data",
        demo("train.jsonl")
    ];
    args.extend(args!["--tokens", "<dax>,<wug>", "--out", workspace.path(out)]);
    args.extend(args!["--steps", steps.to_string(), "--batch-size", "2"]);
    args.extend(more.iter().map(OsString::from));
    args
}

/// The rows that were written, and what the file says of them.
fn written(workspace: &Workspace) -> (Vec<Vec<f32>>, String, Value) {
    let file = workspace.out().join("adapter_model.safetensors");
    let tensors = read_tensors(&file);
    let flat = floats_of(&tensors, KEY);
    assert_eq!(tensors[KEY], tensors[TIED_KEY]);
    let bytes = fs::read(&file).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let init = header.metadata().as_ref().unwrap()["trainable_tokens.init"].clone();
    let config = read_json(&workspace.out().join("adapter_config.json"));
    let rows = flat.chunks(DIM).map(<[f32]>::to_vec).collect();
    (rows, init, config["init_weights"].clone())
}

fn mean_of<'a>(rows: impl IntoIterator<Item = &'a Vec<f64>>) -> Vec<f64> {
    let (mut sum, mut count) = (vec![0.0; DIM], 0.0);
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        count += 1.0;
    }
    sum.iter().map(|x| x / count).collect()
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[allow(clippy::cast_possible_truncation)] // rounds, as the library does
fn rounded(row: &[f64]) -> Vec<f32> {
    row.iter().map(|x| *x as f32).collect()
}

#[test]
fn every_exact_mode_writes_its_rows_and_its_name() {
    let workspace = Workspace::new();
    let e = table();
    let pick = |ids: &[usize]| mean_of(ids.iter().map(|id| &e[*id]));
    let mean_norm = e.iter().map(|row| norm(row)).sum::<f64>() / 965.0;
    let scaled = |row: &[f64], to: f64| row.iter().map(|x| x * (to / norm(row))).collect::<Vec<f64>>();
    let own = [e[963].clone(), e[964].clone()];
    let same = |row: Vec<f64>| [row.clone(), row];
    let blend: Vec<f64> = e[586]
        .iter()
        .zip(&e[5])
        .map(|(a, b)| (1.0 - 0.25) * a + 0.25 * b)
        .collect();
    // The pieces are those that the tokenizers library of Python gives without the two tokens.
    let cases = [
        ("keep", "keep", own.clone()),
        ("zeros", "zeros", same(vec![0.0; DIM])),
        ("mean", "mean", same(mean_of(&e))),
        ("mean:others", "mean:others", same(mean_of(&e[..963]))),
        ("copy:586", "copy:586", same(e[586].clone())),
        ("copy:zz", "copy:586", same(e[586].clone())),
        ("copy:<wug>", "copy:964", same(e[964].clone())),
        ("mean-of:5,7,7", "mean-of:5,7,7", same(pick(&[5, 7, 7]))),
        (
            "interpolate:zz:5:0.25",
            "interpolate:586:5:0.25",
            same(blend.clone()),
        ),
        ("interpolate:586:5:.25", "interpolate:586:5:0.25", same(blend)),
        (
            "subtokens",
            "subtokens",
            [pick(&[30, 70, 67, 90, 32]), pick(&[30, 89, 87, 73, 32])],
        ),
        (
            "description:a small blue bird",
            "description:a small blue bird",
            same(pick(&[67, 434, 477, 530])),
        ),
        (
            "keep+norm-match",
            "keep+norm-match",
            own.clone().map(|row| scaled(&row, mean_norm)),
        ),
        (
            "subtokens+norm-match:2",
            "subtokens+norm-match:2.0",
            [
                scaled(&pick(&[30, 70, 67, 90, 32]), 2.0),
                scaled(&pick(&[30, 89, 87, 73, 32]), 2.0),
            ],
        ),
    ];
    for (mode, name, want) in cases {
        let report = run(&init(
            &workspace,
            "<dax>,<wug>",
            &["--json", "--init", mode, "--seed", "3"],
        ))
        .ok()
        .json();
        let (rows, recorded, init_weights) = written(&workspace);
        assert_eq!(
            (report["init"].as_str(), recorded.as_str()),
            (Some(name), name),
            "{mode}"
        );
        assert_eq!(init_weights, json!(mode == "keep"), "{mode}");
        for (slot, want) in want.iter().enumerate() {
            assert_eq!(rows[slot], rounded(want), "{mode}, slot {slot}");
        }
        // What is recorded says the same when it is asked for, by its name and token by token.
        run(&init(&workspace, "<dax>,<wug>", &["--init", name])).ok();
        assert_eq!(written(&workspace).0, rows, "{name}");
        let by_ids = report["row_inits"].as_array().unwrap();
        let own = [(DAX, &by_ids[0]), (WUG, &by_ids[1])]
            .map(|(id, init)| format!("{id}={}", init.as_str().unwrap()));
        run(&init(
            &workspace,
            "<dax>,<wug>",
            &["--init-token", &own[0], "--init-token", &own[1]],
        ))
        .ok();
        assert_eq!(written(&workspace).0, rows, "{own:?}");
    }
}

#[test]
fn random_modes_follow_their_seed() {
    let workspace = Workspace::new();
    let rows = |tokens: &str, more: &[&str]| {
        run(&init(&workspace, tokens, more)).ok();
        let (rows, recorded, init_weights) = written(&workspace);
        assert_eq!(init_weights, json!(false));
        (rows, recorded)
    };
    for (mode, recorded) in [
        ("random", "random:0.02+seed:5"),
        ("random:1", "random:1.0+seed:5"),
        ("mean+noise:0.01", "mean+noise:0.01+seed:5"),
        ("mean-covariance", "mean-covariance:1e-9+seed:5"),
        ("mean+covariance:1", "mean-covariance:1.0+seed:5"),
        (
            "subtokens+noise:0.1+norm-match",
            "subtokens+noise:0.1+norm-match+seed:5",
        ),
    ] {
        let both = "<dax>,<wug>";
        let first = rows(both, &["--init", mode, "--seed", "5"]);
        assert_eq!(first.1, recorded);
        assert_ne!(first.0[0], first.0[1], "{mode}");
        assert_eq!(
            rows(both, &["--init", recorded, "--seed", "8"]).0,
            first.0,
            "{mode}"
        );
        assert_ne!(rows(both, &["--init", mode, "--seed", "6"]).0, first.0, "{mode}");
        // A token's row depends neither on the other tokens nor on its slot, but for the sub-tokens of both.
        let swapped = rows("<wug>,<dax>", &["--init", mode, "--seed", "5"]).0;
        assert_eq!([&swapped[1], &swapped[0]], [&first.0[0], &first.0[1]], "{mode}");
    }
    let (drawn, _) = rows("<dax>,<wug>", &["--init", "random:0.5"]);
    let values: Vec<f64> = drawn.concat().into_iter().map(f64::from).collect();
    let n = values.len() as f64;
    let (mean, square) = (
        values.iter().sum::<f64>() / n,
        values.iter().map(|x| x * x).sum::<f64>() / n,
    );
    assert!(mean.abs() < 5.0 * 0.5 / n.sqrt(), "{mean}");
    assert!((square - 0.25).abs() < 5.0 * 0.25 * (2.0 / n).sqrt(), "{square}");
}

#[test]
fn tokens_may_start_in_their_own_ways() {
    let workspace = Workspace::new();
    let e = table();
    let more = ["--init-token", "<wug>=description:a small blue bird", "--json"];
    let report = run(&init(&workspace, "<dax>,<wug>", &more)).ok().json();
    let (rows, recorded, init_weights) = written(&workspace);
    assert_eq!(recorded, "keep; 964=description:a small blue bird");
    assert_eq!(report["init"], json!(recorded));
    assert_eq!(report["row_inits"], json!(["keep", "mean-of:67,434,477,530"]));
    assert_eq!(init_weights, json!(false));
    assert_eq!(rows[0], rounded(&e[963]));
    assert_eq!(
        rows[1],
        rounded(&mean_of([67, 434, 477, 530].map(|id: usize| &e[id])))
    );
    let more = [
        "--init-token=963=copy:5",
        "--init-token=<wug>=copy:7",
        "--init=mean",
    ];
    let text = run(&init(&workspace, "<wug>,<dax>", &more)).ok();
    for part in ["964=copy:7; 963=copy:5", "\"<dax>\": copy:5"] {
        assert!(text.stdout.contains(part), "{text:#?}");
    }
    assert_eq!(written(&workspace).0, [rounded(&e[7]), rounded(&e[5])]);
}

#[test]
fn what_was_initialised_is_read_by_the_other_commands() {
    let workspace = Workspace::new();
    run(&init(
        &workspace,
        "<dax>,<wug>",
        &["--init", "description:a blue bird+noise:0.01", "--seed", "4"],
    ))
    .ok();
    let (out, model) = (workspace.out(), demo("model"));
    let verified = run(&args!["verify", "--json", "--model", model, "--adapter", out])
        .ok()
        .json();
    assert_eq!(verified["fits"], json!(true));
    let inspected = run(&args!["inspect", "--json", out]).ok().json();
    assert_eq!(
        inspected["init"],
        json!("description:a blue bird+noise:0.01+seed:4")
    );
    run(&args!["inspect", out, "--model", model]).ok();
    let merged = workspace.path("merged");
    run(&args![
        "merge",
        "--model",
        model,
        "--adapter",
        out,
        "--out",
        merged
    ])
    .ok();
}

#[test]
fn training_starts_from_the_initialised_rows() {
    let workspace = Workspace::new();
    let e = table();
    let train = |more: &[&str]| train(&workspace, "out", 2, more);
    // With a learning rate of 0 they are what is written.
    let still = train(&[
        "--lr",
        "0",
        "--init",
        "mean",
        "--init-token",
        "<wug>=random+seed:1",
    ]);
    let report = run(&still).ok().json();
    let (rows, recorded, init_weights) = written(&workspace);
    assert_eq!(recorded, "mean; 964=random:0.02+seed:1");
    assert_eq!((&report["init"], init_weights), (&json!(recorded), json!(false)));
    assert_eq!(rows[0], rounded(&mean_of(&e)));
    run(&init(&workspace, "<wug>", &["--init", "random+seed:1"])).ok();
    assert_eq!(rows[1], written(&workspace).0[0]);
    run(&train(&["--init", "subtokens"])).ok();
    let start = mean_of([30, 70, 67, 90, 32].map(|id: usize| &e[id]));
    assert_ne!(written(&workspace).0[0], rounded(&start));
    assert_eq!(run(&train(&[])).ok().json()["init"], json!("keep"));
    assert_eq!(written(&workspace).2, json!(true));
    let text: Vec<_> = train(&["--init", "subtokens"])
        .into_iter()
        .filter(|arg| arg != "--json")
        .collect();
    let text = run(&text).ok();
    assert!(
        text.stdout.contains("rows started as") && text.stdout.contains("subtokens"),
        "{text:#?}"
    );
}

#[test]
fn a_run_goes_on_as_it_started() {
    let workspace = Workspace::new();
    // Decay pulls toward the rows that the run started with, so they have to be the same again.
    let options = [
        "--init=mean+noise:0.1",
        "--decay-toward=original",
        "--weight-decay=0.5",
        "--lr=0.1",
        "--save-every=1",
    ];
    run(&train(&workspace, "out", 4, &options)).ok();
    let whole = snapshot(&workspace.out());
    let part = workspace.path("part");
    run(&train(&workspace, "part", 2, &options)).ok();
    let resume = |more: &[&str]| {
        let mut args = train(&workspace, "out", 4, &options[1..]);
        args.extend(args!["--resume", part]);
        args.extend(more.iter().map(OsString::from));
        args
    };
    run(&resume(&options[..1])).ok();
    assert!(snapshot(&workspace.out()) == whole, "the resumed run differs");
    for other in ["keep", "mean", "mean+noise:0.2", "mean+noise:0.1+seed:1"] {
        workspace.refuses(
            &resume(&["--init", other]),
            &["mean+noise:0.1+seed:0", other, "--init"],
        );
    }
}

#[test]
fn what_cannot_be_initialised_is_refused() {
    let workspace = Workspace::new();
    for command in ["init", "train"] {
        let base = |more: &[&str]| match command {
            "init" => init(&workspace, "<dax>,<wug>", more),
            _ => train(&workspace, "out", 1, more),
        };
        for (mode, parts) in [
            ("copy:965", &["965", "965 rows"][..]),
            ("mean-of:5,4000000000", &["4000000000", "965 rows"]),
            ("mean-of:", &["at least one token"]),
            ("interpolate:1:965:0.5", &["965"]),
            ("interpolate:1:2:nan", &["t is NaN", "finite"]),
            ("interpolate:1:2:inf", &["t is inf", "finite"]),
            ("random:-0.5", &["std is -0.5", "at least 0"]),
            ("random:inf", &["std is inf"]),
            ("mean-covariance:-1", &["scale is -1", "at least 0"]),
            ("mean+noise:-1", &["noise is -1", "at least 0"]),
            ("mean+norm-match:0", &["norm-match is 0", "above 0"]),
            ("zeros+norm-match", &["963", "zero"]),
            ("random:1e300", &["963", "too large for F32"]),
            ("copy:no such token", &["'no such token'", "ids, not one"]),
            ("interpolate:zz:no such token:0.5", &["'no such token'"]),
            ("description:the <dax> bird", &["963", "itself"]),
        ] {
            workspace.refuses(&base(&["--init", mode]), parts);
        }
        for (token, parts) in [
            (&["--init-token=5=mean"][..], &["5", "not among the tokens"][..]),
            (&["--init-token=965=mean"], &["965", "not among the tokens"]),
            (&["--init-token=no such token=mean"], &["'no such token'"]),
            (
                &["--init-token=<dax>=mean", "--init-token=963=keep"],
                &["963", "twice"],
            ),
            (&["--init-token=<wug>=zeros+norm-match"], &["964", "zero"]),
        ] {
            workspace.refuses(&base(token), parts);
        }
        for wrong in [
            "--init=best",
            "--init=",
            "--init=random:x",
            "--init=mean:all",
            "--init=copy:",
            "--init=description:",
            "--init=mean+noise",
            "--init=mean+seed:1+seed:2",
            "--init=interpolate:1:2",
            "--init-token=mean",
            "--init-token=<dax>=best",
        ] {
            run(&base(&[wrong])).misused(&[wrong.split('=').next().unwrap()]);
        }
    }
    assert!(!workspace.out().exists());
}

#[test]
fn tokens_without_pieces_are_refused_and_unknown_parts_are_told() {
    // A list of words: a word that is taken away leaves nothing but the unknown token.
    let workspace = Workspace::new();
    let init = |ids: &str, mode: &str| {
        let mut args = workspace.command_with("init", &["--json", "--force", "--init", mode]);
        let at = args.iter().position(|arg| arg == "--token-ids").unwrap();
        args[at + 1] = ids.into();
        args
    };
    workspace.refuses(&init("166", "subtokens"), &["'the'", "unknown"]);
    workspace.refuses(
        &init("166", "description:quick brown"),
        &["'quick brown'", "unknown"],
    );
    // `<think>` is one word between brackets that are unknown.
    for (ids, mode, row) in [
        ("297", "subtokens", "mean-of:171"),
        ("299", "description:the quick cat", "mean-of:166,167"),
    ] {
        let run = run(&init(ids, mode));
        assert_eq!((run.code, run.stderr.lines().count()), (Some(0), 1), "{run:#?}");
        assert!(
            run.stderr.contains("does not know") && run.stderr.contains(ids),
            "{run:#?}"
        );
        assert_eq!(run.json()["row_inits"], json!([row]));
    }
    // Without a tokenizer, ids do, and strings are refused.
    fs::remove_file(workspace.model().join("tokenizer.json")).unwrap();
    run(&init("297", "copy:5+noise:0.1")).ok();
    fs::remove_dir_all(workspace.out()).unwrap();
    for mode in ["subtokens", "copy:the", "description:the cat"] {
        workspace.refuses(&init("297", mode), &["tokenizer.json"]);
    }
}

#[test]
fn rows_that_are_no_numbers_are_refused() {
    let workspace = Workspace::new();
    let weights = workspace.model().join("model.safetensors");
    support::edit_tensors(&weights, |tensors| {
        let (_, shape, bytes) = tensors.get_mut("model.embed_tokens.weight").unwrap();
        let at = 4 * (12 * shape[1] + 3);
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    for mode in [
        "mean",
        "mean-covariance",
        "copy:12",
        "keep+noise:1",
        "keep+norm-match",
        "copy:5+norm-match",
    ] {
        workspace.refuses(
            &workspace.command_with("init", &["--init", mode]),
            &["token id 12", "not finite", "column 3"],
        );
    }
    // 12 is among the tokens that train, so it is none of the others.
    run(&workspace.command_with("init", &["--init", "mean:others"])).ok();
    run(&workspace.command_with("init", &["--force"])).ok();
}

//! What is seen of a run: dead rows, neighbours, curves, a report; and what the shell is told.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Workspace, args, demo, edit_json, fixture, floats_of, read_json_lines, read_tensors, run};

fn train(workspace: &Workspace, ids: &str, more: &[&str]) -> Vec<OsString> {
    let mut args = args![
        "train",
        "--json",
        "--force",
        "--model",
        workspace.model(),
        "--data",
        workspace.data(),
        "--token-ids",
        ids,
        "--out",
        workspace.out()
    ];
    args.extend(more.iter().map(OsString::from));
    args
}

/// The dead tokens of a summary, and why.
fn dead(summary: &Value) -> Vec<(u64, String)> {
    let tokens = summary["dead_tokens"].as_array().unwrap().iter();
    let reason = |token: &Value| token["reason"].as_str().unwrap().to_owned();
    tokens
        .map(|token| (token["token_id"].as_u64().unwrap(), reason(token)))
        .collect()
}

#[test]
fn rows_that_no_step_reaches_are_named() {
    let workspace = Workspace::new();
    // 299 and 12 occur; 2 only at the end of a line, from which the untied model learns nothing; 44 and 45 do not occur.
    let steps = ["--steps", "4", "--batch-size", "1"];
    let report = run(&train(&workspace, "299,2,44,12,45", &steps)).ok().json();
    assert_eq!(
        dead(&report),
        [
            (2, "its gradient was exactly 0 in every step".to_owned()),
            (44, "it never occurs in the data".to_owned()),
            (45, "it never occurs in the data".to_owned())
        ]
    );
    let tokens = report["tokens"].as_array().unwrap();
    let drift = |slot: usize| tokens[slot]["drift"].as_f64().unwrap();
    assert!(drift(0) > 0.0 && drift(3) > 0.0, "{report}");
    assert_eq!([drift(1), drift(2), drift(4)], [0.0; 3]);
    // One step takes the first line alone, in which 60 is not.
    let report = run(&train(
        &workspace,
        "299,60",
        &["--steps", "1", "--batch-size", "1"],
    ))
    .ok()
    .json();
    assert_eq!(
        dead(&report),
        [(60, "it does not occur in the data of the steps so far".to_owned())]
    );
    let frozen = ["--steps", "2", "--batch-size", "2", "--token-lr", "44=0"];
    assert_eq!(dead(&run(&train(&workspace, "299,44", &frozen)).ok().json()), []);

    // On the way they are warned of once, and only once they have been idle for so long.
    let warned = |more: &[&str]| {
        let outcome = run(&train(&workspace, "299,44,12", more));
        assert_eq!(outcome.code, Some(0), "{outcome:#?}");
        outcome.stderr
    };
    let short = ["--steps", "7", "--batch-size", "2", "--warn-dead-after", "3"];
    let text = warned(&short);
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in ["warning: ", "44", "3 steps", "never occurs in the data"] {
        assert!(text.contains(part), "no '{part}' in {text}");
    }
    assert_eq!(
        warned(&["--steps", "7", "--batch-size", "2", "--warn-dead-after", "0"]),
        ""
    );
    assert_eq!(
        warned(&["--steps", "7", "--batch-size", "2", "--warn-dead-after", "8"]),
        ""
    );
    let text = run(&args![
        "train",
        "--force",
        "--model",
        workspace.model(),
        "--data",
        workspace.data(),
        "--token-ids",
        "44,12",
        "--steps",
        "2",
        "--out",
        workspace.out()
    ])
    .ok();
    assert!(
        text.stdout.contains("row not reached") && text.stdout.contains("token id 44"),
        "{text:#?}"
    );
}

/// A run that is cut in two knows of the steps before the cut.
#[test]
fn a_resumed_run_tells_what_a_straight_one_does() {
    let workspace = Workspace::new();
    // 12 is in the first line alone, 44 in none.
    let lines = [[1, 12, 7, 60], [1, 299, 7, 60], [1, 299, 8, 61], [1, 299, 9, 62]];
    let lines = lines.map(|ids| json!({ "input_ids": ids }).to_string());
    fs::write(workspace.data(), lines.join("\n")).unwrap();
    let out = workspace.out();
    let run = |steps: &str, more: &[&str]| {
        let options = ["--batch-size", "1", "--save-every", "1", "--warn-dead-after", "3"];
        let more = [&["--steps", steps], &options[..], more].concat();
        let outcome = run(&train(&workspace, "299,12,44", &more));
        assert_eq!(outcome.code, Some(0), "{outcome:#?}");
        let never = "it never occurs in the data";
        assert_eq!(dead(&outcome.json()), [(44, never.to_owned())], "{outcome:#?}");
        outcome.stderr
    };
    let straight = run("4", &[]);
    let of = |text: &str, part: &str| text.lines().filter(|line| line.contains(part)).count();
    assert_eq!(
        [of(&straight, "44"), of(&straight, "it was reached before")],
        [1, 1],
        "{straight}"
    );
    let first = run("2", &[]);
    let second = run("4", &["--resume", out.to_str().unwrap()]);
    assert_eq!(format!("{first}{second}"), straight);
}

/// A tied head gives every row a gradient, whether or not its token is anywhere.
#[test]
fn a_tied_head_hides_no_dead_row() {
    let workspace = Workspace::new();
    fs::remove_dir_all(workspace.model()).unwrap();
    support::copy_dir(&fixture("llama_tied/base"), &workspace.model());
    fs::write(workspace.data(), json!({"input_ids": [1, 12, 7, 60]}).to_string()).unwrap();
    let report = run(&train(
        &workspace,
        "12,44",
        &["--steps", "3", "--batch-size", "2"],
    ))
    .ok()
    .json();
    assert!(
        report["tokens"][1]["drift"].as_f64().unwrap() > 0.0,
        "the head moves it: {report}"
    );
    assert_eq!(dead(&report), [(44, "it never occurs in the data".to_owned())]);
}

#[test]
fn rows_are_shown_with_what_they_are_near_to() {
    let workspace = Workspace::new();
    let (model, metrics) = (workspace.model(), workspace.path("metrics.jsonl"));
    let options = [
        "--steps",
        "5",
        "--lr",
        "0.1",
        "--metrics",
        metrics.to_str().unwrap(),
    ];
    let summary = run(&train(&workspace, "299,12", &options)).ok().json();
    let shown = run(&args!["inspect", "--json", workspace.out(), "--model", model])
        .ok()
        .json();
    let table = floats_of(
        &read_tensors(&model.join("model.safetensors")),
        "model.embed_tokens.weight",
    );
    let dim = table.len() / 300;
    let exact = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let mut rows: Vec<Vec<f64>> = table.chunks(dim).map(exact).collect();
    let key = "base_model.model.model.embed_tokens.trainable_tokens_delta";
    let trained = floats_of(
        &read_tensors(&workspace.out().join("adapter_model.safetensors")),
        key,
    );
    let trained: Vec<Vec<f64>> = trained.chunks(dim).map(exact).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let nearest = |rows: &[Vec<f64>], of: usize| {
        let others = (0..300)
            .filter(|id| *id != of)
            .map(|id| (id, cosine(&rows[of], &rows[id])));
        let mut others: Vec<_> = others.filter(|(_, cosine)| cosine.is_finite()).collect();
        others.sort_by(|a, b| b.1.total_cmp(&a.1));
        others.truncate(5);
        others
    };
    let before = rows.clone();
    rows[299].clone_from(&trained[0]);
    rows[12].clone_from(&trained[1]);
    let close =
        |value: &Value, want: f64| assert!((value.as_f64().unwrap() - want).abs() < 1e-6, "{value} {want}");
    for (source, found) in [
        ("train", &summary["tokens"]),
        ("inspect", &shown["modules"][0]["rows"]),
    ] {
        for (slot, id) in [299, 12].into_iter().enumerate() {
            let row = &found[slot];
            assert_eq!(row["token_id"], id, "{source}");
            assert!(row["token"].is_string(), "{source}: {row}");
            close(&row["norm_before"], dot(&before[id], &before[id]).sqrt());
            close(&row["norm"], dot(&rows[id], &rows[id]).sqrt());
            let apart: Vec<f64> = rows[id].iter().zip(&before[id]).map(|(a, b)| a - b).collect();
            close(&row["drift"], dot(&apart, &apart).sqrt());
            close(&row["cosine"], cosine(&rows[id], &before[id]));
            for (name, rows) in [("neighbours_before", &before), ("neighbours", &rows)] {
                let near = row[name].as_array().unwrap();
                let want = nearest(rows, id);
                assert_eq!(near.len(), want.len());
                for (near, (id, cosine)) in near.iter().zip(want) {
                    assert_eq!(near["token_id"], id, "{source}, {name}: {row}");
                    close(&near["cosine"], cosine);
                }
            }
        }
    }
    // The last step's measures are those of the adapter.
    let lines = read_json_lines(&metrics);
    let last = &lines[lines.len() - 2];
    for slot in 0..2 {
        close(
            &last["row_norms"][slot],
            summary["tokens"][slot]["norm"].as_f64().unwrap(),
        );
        close(
            &last["row_drifts"][slot],
            summary["tokens"][slot]["drift"].as_f64().unwrap(),
        );
    }
    let text = run(&args!["inspect", workspace.out(), "--model", model])
        .ok()
        .stdout;
    for part in ["norm before", "cosine", "nearest", "299"] {
        assert!(text.contains(part), "no '{part}' in {text}");
    }
}

#[test]
fn metrics_are_drawn() {
    let workspace = Workspace::new();
    let (metrics, svg) = (workspace.path("metrics.jsonl"), workspace.path("curves.svg"));
    let data = workspace.data();
    let eval = ["--eval-data", data.to_str().unwrap(), "--eval-every", "2"];
    let path = metrics.to_str().unwrap();
    let options = [&["--steps", "5", "--metrics", path][..], &eval].concat();
    run(&train(&workspace, "299,12", &options)).ok();
    let plot = |force: bool| {
        let mut args = args!["plot", "--json", metrics, "--out", svg];
        args.extend(force.then(|| OsString::from("--force")));
        args
    };
    let report = run(&plot(false)).ok().json();
    let charts = ["loss", "gradient norm", "learning rate", "row norms", "row drift"];
    assert_eq!((&report["charts"], &report["steps"]), (&json!(charts), &json!(5)));
    let drawn = fs::read_to_string(&svg).unwrap();
    for text in charts.iter().chain(&["training batch", "held-out data", "step"]) {
        assert!(drawn.contains(text), "no '{text}'");
    }
    run(&plot(false)).refused(&["curves.svg", "--force"]);
    run(&plot(true)).ok();
    assert_eq!(fs::read_to_string(&svg).unwrap(), drawn);

    run(&args!["plot", metrics, "--out", workspace.path("curves.png")]).refused(&["curves.png", ".svg"]);

    // Without the closing line, as after a kill; without rows and evaluations; something else; nothing.
    let lines = fs::read_to_string(&metrics).unwrap();
    let steps: Vec<&str> = lines.lines().take(3).collect();
    fs::write(&metrics, steps.join("\n")).unwrap();
    assert_eq!(run(&plot(true)).ok().json()["charts"], json!(charts));
    fs::write(&metrics, r#"{"step":1,"loss":2.5,"lr":0.1,"grad_norm":1.0}"#).unwrap();
    assert_eq!(run(&plot(true)).ok().json()["charts"], json!(charts[..3]));
    fs::write(
        &metrics,
        "{\"step\":1,\"loss\":2.5,\"lr\":0.1,\"grad_norm\":1.0}\n[1]\n",
    )
    .unwrap();
    run(&plot(true)).refused(&["metrics.jsonl", "line 2"]);
    fs::write(&metrics, "").unwrap();
    run(&plot(true)).refused(&["metrics.jsonl", "no step"]);
    fs::remove_file(&metrics).unwrap();
    run(&plot(true)).refused(&["metrics.jsonl: No such file"]);
    assert!(!drawn.is_empty() && svg.exists());
}

fn assert_page(path: &Path, parts: &[&str]) -> String {
    let page = fs::read_to_string(path).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    for part in parts {
        assert!(page.contains(part), "no '{part}' in the page");
    }
    page
}

#[test]
fn a_report_is_one_page_and_escapes_every_string() {
    let workspace = Workspace::new();
    let (model, report) = (workspace.path("grown"), workspace.path("report.html"));
    let token = "<b onclick=\"x()\">&";
    run(&args![
        "add-tokens",
        "--model",
        demo("model"),
        "--tokens",
        token,
        "--out",
        model
    ])
    .ok();
    let args = args![
        "train",
        "--model",
        model,
        "--data",
        demo("train.jsonl"),
        "--tokens",
        format!("<dax>,{token}"),
        "--steps",
        "3",
        "--lr",
        "0.02",
        "--report",
        report,
        "--out",
        workspace.out()
    ];
    run(&args).ok();
    let page = assert_page(
        &report,
        &[
            "&lt;dax&gt;",
            "&lt;b onclick=&quot;x()&quot;&gt;&amp;",
            "it never occurs in the data",
            "<svg",
            "--lr",
            "0.02",
        ],
    );
    assert!(!page.contains("<b ") && !page.contains("<script") && !page.contains("<img"));
    assert_eq!(page.matches("<svg").count(), 5);
    for elsewhere in ["src=", "@import", "url(", "https://"] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
    // It is replaced only by force, which is asked before any work.
    let again = [args, args!["--force"]].concat();
    let before = workspace.snapshot();
    let refused = args![
        "train",
        "--model",
        model,
        "--data",
        demo("train.jsonl"),
        "--tokens",
        "<dax>",
        "--report",
        report,
        "--out",
        workspace.path("other")
    ];
    run(&refused).refused(&["report.html", "--force"]);
    workspace.unchanged(&before, &refused);
    run(&again).ok();
}

#[test]
fn shells_and_man_know_every_command() {
    let workspace = Workspace::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = run(&args!["completions", shell]).ok().stdout;
        for word in ["add-tokens", "completions", "warn-dead-after", "init-token"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
        let report = run(&args!["completions", shell, "--json"]).ok().json();
        assert_eq!(
            (&report["shell"], report["script"].as_str().unwrap().trim()),
            (&json!(shell), script.trim())
        );
    }
    run(&args!["completions", "csh"]).misused(&["csh"]);
    let page = run(&args!["man"]).ok().stdout;
    assert!(
        page.contains(".TH trainable-tokens 1") && page.contains("add\\-tokens"),
        "{page}"
    );
    let report = run(&args!["man", "--json"]).ok().json();
    assert_eq!(report["page"].as_str().unwrap().trim(), page.trim());
    let dir = workspace.path("man");
    let report = run(&args!["man", "--out", dir, "--json"]).ok().json();
    let pages = report["pages"].as_array().unwrap();
    assert!(
        pages.contains(&json!("trainable-tokens.1")) && pages.contains(&json!("trainable-tokens-train.1"))
    );
    for page in pages {
        let text = fs::read_to_string(dir.join(page.as_str().unwrap())).unwrap();
        assert!(
            text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"),
            "{page}"
        );
    }
    assert!(
        fs::read_to_string(dir.join("trainable-tokens-train.1"))
            .unwrap()
            .contains("warn\\-dead\\-after")
    );
    run(&args!["man", "--out", dir]).refused(&["trainable-tokens.1", "--force"]);
}

/// bash itself takes the script, and completes by it.
#[test]
#[cfg(unix)]
fn bash_completes_by_the_script() {
    let workspace = Workspace::new();
    let script = workspace.path("completions.bash");
    fs::write(&script, run(&args!["completions", "bash"]).ok().stdout).unwrap();
    let ask = "source \"$0\"; COMP_WORDS=(trainable-tokens add); COMP_CWORD=1; \
               f=$(complete -p trainable-tokens | sed 's/.*-F \\([^ ]*\\).*/\\1/'); \
               $f trainable-tokens add trainable-tokens; echo \"${COMPREPLY[@]}\"";
    let mut bash = assert_cmd::Command::new("bash");
    let output = bash.args(["--norc", "-c", ask]).arg(&script).output().unwrap();
    let reply = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        reply.trim(),
        "add-tokens",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A token that the tokenizer does not find in a sentence would never train.
#[test]
fn a_token_must_be_found_inside_sentences() {
    let workspace = Workspace::new();
    let path = workspace.model().join("tokenizer.json");
    edit_json(&path, |tokenizer| {
        tokenizer["normalizer"] = json!({"type": "Prepend", "prepend": "x"});
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        added.push(
            json!({"id": 300, "content": "<odd>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": true}),
        );
    });
    let args = args![
        "init",
        "--model",
        workspace.model(),
        "--tokens",
        "<odd>",
        "--out",
        workspace.out()
    ];
    workspace.refuses(&args, &["'<odd>'", "not found in", "encodes to"]);
}

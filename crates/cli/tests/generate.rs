//! `generate`: greedy or drawn continuations, with and without an adapter.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use support::{Workspace, run};

fn generated(workspace: &Workspace, more: &[&str]) -> Value {
    let mut more = more.to_vec();
    more.push("--json");
    run(&workspace.command_with("generate", &more)).ok().json()
}

#[test]
fn draws_follow_their_seed_and_nothing_else() {
    let workspace = Workspace::new();
    let draw = |seed: &str, top_p: &str| {
        let options = ["--temperature=1.5", seed, top_p, "--max-new-tokens=8"];
        generated(&workspace, &options)["token_ids"].clone()
    };
    assert_eq!(draw("--seed=1", "--top-p=0.9"), draw("--seed=1", "--top-p=0.9"));
    assert_ne!(draw("--seed=1", "--top-p=0.9"), draw("--seed=2", "--top-p=0.9"));
    let greedy = generated(&workspace, &["--max-new-tokens=8"]);
    assert_eq!(draw("--seed=1", "--top-p=0"), greedy["token_ids"]);
    assert_eq!(greedy["prompt"], Value::Null);
    assert_eq!(greedy["prompt_ids"], json!([1, 299, 12, 40]));
    assert_eq!(
        greedy["new_tokens"],
        json!(greedy["token_ids"].as_array().unwrap().len())
    );
    assert!(greedy["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_rows_of_an_adapter_count_and_a_prompt_can_be_text() {
    let workspace = Workspace::new();
    let named = run(&workspace.command_with("init", &["--json"])).ok().json();
    let prompt = format!("--prompt={}", named["tokens"][0].as_str().unwrap());
    let continued = |with_adapter: bool| {
        let mut args = support::args!["generate", "--json", "--model", workspace.model(), prompt];
        if with_adapter {
            args.extend(support::args!["--adapter", workspace.adapter()]);
        }
        run(&args).ok().json()
    };
    let (base, adapted) = (continued(false), continued(true));
    assert_eq!(base["prompt"], adapted["prompt"]);
    assert!(
        base["prompt_ids"].as_array().unwrap().contains(&json!(299)),
        "{base}"
    );
    assert_ne!(base["token_ids"], adapted["token_ids"]);
    assert!(!base["text"].as_str().unwrap().is_empty());
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let workspace = Workspace::new();
    let model = workspace.model();
    let refuse = |more: &[&str], parts: &[&str]| {
        let mut args = support::args!["generate", "--model", model];
        args.extend(more.iter().map(std::ffi::OsString::from));
        workspace.refuses(&args, parts);
    };
    refuse(&["--prompt-ids=5,300"], &["300"]);
    refuse(&["--prompt-ids=5", "--temperature=-1"], &["temperature", "-1"]);
    refuse(&["--prompt-ids=5", "--top-p=1.5"], &["top_p", "1.5"]);
    let long = vec!["5"; 65].join(",");
    refuse(&["--prompt-ids", &long], &["65 tokens", "64"]);
    for misuse in [&[][..], &["--prompt=a", "--prompt-ids=5"], &["--prompt-ids=a"]] {
        let mut args = support::args!["generate", "--model", model];
        args.extend(misuse.iter().map(std::ffi::OsString::from));
        run(&args).misused(&["--prompt"]);
    }
}

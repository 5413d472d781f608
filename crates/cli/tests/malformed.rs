//! Every malformed adapter of PEFT's fixtures, by the commands that read adapters: refused with status 1 and one line, or
//! taken on purpose; nothing is written in vain, and little memory is taken.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(unix)] // resource usage

mod support;

use std::fs;
use std::path::Path;

use serde_json::json;
use support::{args, fixture, read_json, run, snapshot};

/// Of the cases that a strict reader may take either way: those that are taken. All others are refused, as is argued with
/// each in the tests of the format.
const TAKEN: [&str; 4] = ["extra_key", "inf_value", "nan_value", "target_null"];
/// Taken, but `verify` and `merge --safe` say what is wrong.
const NOT_FINITE: [&str; 2] = ["inf_value", "nan_value"];
/// What only a model can tell: `inspect` without one shows them.
const MISFITS: [&str; 3] = ["index_far_out_of_range", "index_out_of_range", "wrong_dim"];
const PEAK_KIB: i64 = 200 * 1024;

#[derive(Clone, Copy, PartialEq)]
enum Decision {
    Taken,
    Refused,
}

fn decision(case: &Path, name: &str) -> Decision {
    match read_json(&case.join("case.json"))["kind"].as_str() {
        Some("accept") => Decision::Taken,
        Some("either") if TAKEN.contains(&name) => Decision::Taken,
        Some("error" | "either") => Decision::Refused,
        kind => panic!("{name}: {kind:?}"),
    }
}

/// What a refusal must name: the file at fault, or what does not fit the model.
fn culprit(name: &str) -> &'static str {
    match name {
        "config_missing" => "adapter_config.json",
        "pickle_only" => "adapter_model.bin",
        "wrong_dim" => "\"emb\"",
        "target_missing" => "no_such_module",
        _ if MISFITS.contains(&name) => "token_indices[",
        _ => "adapter/adapter_",
    }
}

#[test]
fn every_malformed_adapter_has_the_outcome_decided_for_it() {
    let home = tempfile::tempdir().unwrap();
    let base = fixture("malformed/_base/base");
    let before = snapshot(&base);
    let mut cases = 0;
    for entry in fs::read_dir(fixture("malformed")).unwrap() {
        let case = entry.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "_base" {
            continue;
        }
        cases += 1;
        let adapter = case.join("adapter");
        let out = home.path().join(&name);
        let inspect = args!["inspect", "--json", adapter, "--model", base];
        let verify = args!["verify", "--json", "--model", base, "--adapter", adapter];
        let merge = args![
            "merge",
            "--json",
            "--model",
            base,
            "--adapter",
            adapter,
            "--out",
            out
        ];
        let read = run(&args!["inspect", "--json", adapter]);
        if decision(&case, &name) == Decision::Taken {
            assert_eq!(run(&inspect).ok().json()["kind"], "adapter", "{name}");
            let safe = [merge.clone(), args!["--safe"]].concat();
            if NOT_FINITE.contains(&name.as_str()) {
                let verified = run(&verify);
                verified.failed(&["not finite", "token id"]);
                assert_eq!(verified.json()["fits"], json!(false), "{name}");
                run(&safe).refused(&[&name, "emb.weight", "not finite", "token id"]);
                assert!(!out.exists(), "{name}");
            } else {
                assert_eq!(run(&verify).ok().json()["fits"], json!(true), "{name}");
                assert_eq!(run(&safe).ok().json()["rows"], 3, "{name}");
                fs::remove_dir_all(&out).unwrap();
            }
            assert_eq!(run(&merge).ok().json()["rows"], 3, "{name}");
            fs::remove_dir_all(&out).unwrap();
            continue;
        }
        let says = culprit(&name);
        for args in [&inspect, &merge] {
            run(args).refused(&[says]);
        }
        let verified = run(&verify);
        verified.failed(&[says]);
        if read.code == Some(0) {
            // It can be read, so that there are findings to show.
            assert!(
                MISFITS.contains(&name.as_str()) || name == "target_missing",
                "{name}"
            );
            assert_eq!(verified.json()["fits"], json!(false), "{name}");
        } else {
            read.refused(&[says]);
            assert_eq!(verified.stdout, "", "{name}");
        }
        assert!(!out.exists(), "{name}");
    }
    assert_eq!(cases, 82);
    assert_eq!(
        fs::read_dir(home.path()).unwrap().count(),
        0,
        "something was left behind"
    );
    assert!(snapshot(&base) == before, "the base changed");
    #[cfg(target_os = "linux")]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let peak = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
        assert!(peak > 0 && peak < PEAK_KIB, "{peak} KiB");
    }
}

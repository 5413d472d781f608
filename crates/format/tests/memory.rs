//! Hostile adapters take little memory to refuse.
#![allow(clippy::unwrap_used, clippy::panic)]
#![cfg(target_os = "linux")]

mod common;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::fixtures;
use trainable_tokens_format::{Adapter, BaseCheck, Checkpoint};

/// What reading an adapter, and comparing it with its base, may take.
const LIMIT_KIB: u64 = 200 * 1024;
const ADAPTER: &str = "TRAINABLE_TOKENS_ADAPTER";
const BASE: &str = "TRAINABLE_TOKENS_BASE";

/// Run alone in a process of its own by [`peak_of`].
#[test]
fn one_adapter() {
    let (Some(adapter), Some(base)) = (env::var_os(ADAPTER), env::var_os(BASE)) else {
        return;
    };
    let base = Checkpoint::open(base).unwrap();
    let result =
        Adapter::read(adapter).and_then(|adapter| adapter.check_against(&base, BaseCheck::SameTable));
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    println!(
        "peak {} of {:?}",
        peak.trim(),
        result.map_err(|error| error.to_string().len())
    );
}

/// The most memory that a process held while it read the adapter.
fn peak_of(adapter: &Path, base: &Path) -> u64 {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "one_adapter", "--nocapture"])
        .env(ADAPTER, adapter)
        .env(BASE, base)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success(), "{}: {text}", adapter.display());
    let (_, peak) = text.split_once("peak ").unwrap_or_else(|| panic!("{text}"));
    peak.split_once(" kB").unwrap().0.trim().parse().unwrap()
}

#[test]
fn every_malformed_adapter_stays_below_the_limit() {
    let all = fixtures().join("malformed");
    let mut cases = 0;
    for entry in fs::read_dir(&all).unwrap() {
        let case = entry.unwrap().path();
        let peak = peak_of(&case.join("adapter"), &all.join("_base/base"));
        assert!(peak < LIMIT_KIB, "{}: {peak} KiB", case.display());
        cases += 1;
    }
    assert_eq!(cases, 83);
}

#[test]
fn the_largest_files_that_are_read_stay_below_the_limit() {
    const CONFIG: usize = 4 << 20;
    let filled = |open: &str, item: &str, close: &str| {
        let mut text = open.to_owned();
        while text.len() + item.len() + close.len() < CONFIG {
            text.push_str(item);
        }
        text.truncate(text.len() - usize::from(text.ends_with(',')));
        text + close
    };
    let ids = |field: &str| {
        let mut text = format!("{{\"peft_type\":\"TRAINABLE_TOKENS\",{field}\"token_indices\":[");
        let mut id = 0;
        while text.len() + 12 < CONFIG {
            let _ = write!(text, "{id},");
            id += 1;
        }
        text + "0]}"
    };
    let mut keys = "{\"peft_type\":\"LORA\",\"x\":{".to_owned();
    for key in 0.. {
        if keys.len() + 20 > CONFIG {
            break;
        }
        let _ = write!(keys, "\"{key:x}\":0,");
    }
    keys.push_str("\"\":0}}");
    let base = fixtures().join("malformed/_base/base");
    for config in [
        keys,
        ids(""),
        filled(
            "{\"peft_type\":\"TRAINABLE_TOKENS\",\"token_indices\":[1],\"x\":[",
            "0,",
            "]}",
        ),
        filled(
            "{\"peft_type\":\"TRAINABLE_TOKENS\",\"token_indices\":[1],\"x\":[",
            "[],",
            "]}",
        ),
        filled(
            "{\"peft_type\":\"TRAINABLE_TOKENS\",\"token_indices\":[1],\"x\":[",
            "{\"\":0},",
            "]}",
        ),
        filled(
            "{\"peft_type\":\"LORA\",\"trainable_token_indices\":[1],\"x\":[",
            "\"\",",
            "]}",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("adapter_config.json"), &config).unwrap();
        let file = fixtures().join("malformed/_base/adapter/adapter_model.safetensors");
        fs::copy(file, dir.path().join("adapter_model.safetensors")).unwrap();
        let peak = peak_of(dir.path(), &base);
        println!("{peak} KiB for {}", &config[..80]);
        assert!(peak < LIMIT_KIB, "{peak} KiB for {}", &config[..80]);
    }
}

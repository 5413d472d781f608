//! The tables of `docs/backends.md` against what the backends' test suites and manifests say.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use trainable_tokens_testkit::{CITATIONS, Group};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// A table of the page under a heading: by row, the cells by backend.
fn table(heading: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let page = read("docs/backends.md");
    let section = page
        .split("\n## ")
        .find(|section| section.starts_with(heading))
        .unwrap()
        .to_owned();
    let mut lines = section.lines().filter(|line| line.starts_with('|')).map(|line| {
        let cells = line.trim_matches('|').split('|');
        cells
            .map(|cell| cell.trim().trim_matches('`').to_owned())
            .collect::<Vec<_>>()
    });
    let backends = lines.next().unwrap();
    let rows = lines.skip(1).map(|row| {
        let cells = backends.iter().cloned().zip(row.iter().cloned()).skip(1);
        (row[0].clone(), cells.collect())
    });
    rows.collect()
}

fn backends() -> Vec<String> {
    let dirs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("backends")).unwrap();
    dirs.map(|dir| dir.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The harnesses of a backend's call of `conformance_tests!`: element type, and the groups left out.
fn harnesses(backend: &str) -> BTreeMap<String, Vec<String>> {
    let file = read(&format!("backends/{backend}/tests/conformance.rs"));
    let call = file
        .split("conformance_tests! {")
        .nth(1)
        .unwrap()
        .split('}')
        .next()
        .unwrap();
    let mut harnesses: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut last = String::new();
    for part in call.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        if let Some((name, _)) = part.split_once(": ").filter(|(name, _)| !name.contains(' ')) {
            name.clone_into(&mut last);
            harnesses.entry(last.clone()).or_default();
        }
        for left_out in part.split("without ").skip(1) {
            let group = left_out.split_whitespace().next().unwrap().to_owned();
            harnesses.get_mut(&last).unwrap().push(group);
        }
    }
    harnesses
}

#[test]
fn the_page_names_every_backend() {
    let table = table("The conformance kit");
    let mut backends = backends();
    backends.sort();
    for row in table.values() {
        assert_eq!(row.keys().cloned().collect::<Vec<_>>(), backends);
    }
}

#[test]
fn element_types_and_groups_are_those_that_the_kit_runs_on() {
    let table = table("The conformance kit");
    let mut groups: Vec<Group> = Vec::new();
    for (group, ..) in CITATIONS {
        if !groups.contains(group) {
            groups.push(*group);
        }
    }
    let types = ["f64", "f32", "f16", "bf16"];
    assert_eq!(
        table.len(),
        types.len() + groups.len(),
        "the page has other rows than the kit"
    );
    for backend in backends() {
        let harnesses = harnesses(&backend);
        assert!(!harnesses.is_empty(), "{backend} runs the kit");
        for name in types {
            let runs = if harnesses.contains_key(name) { "yes" } else { "no" };
            assert_eq!(table[name][&backend], runs, "{backend}, {name}");
        }
        for group in &groups {
            let group = group.to_string();
            let left_out = harnesses.values().any(|left_out| left_out.contains(&group));
            assert_eq!(
                table[&group][&backend],
                if left_out { "no" } else { "yes" },
                "{backend}, {group}"
            );
        }
    }
}

#[test]
fn devices_and_versions_are_those_of_the_manifests() {
    let table = table("Devices and versions");
    let workspace = read("Cargo.toml");
    let version = |manifest: &str| {
        let line = manifest.lines().find(|line| line.starts_with("rust-version = "));
        line.map(|line| line.split('"').nth(1).unwrap().to_owned())
    };
    for backend in backends() {
        let manifest = read(&format!("backends/{backend}/Cargo.toml"));
        for device in ["cuda", "metal", "wgpu"] {
            let has = manifest
                .lines()
                .any(|line| line.starts_with(&format!("{device} = [")));
            assert_eq!(
                table[device][&backend],
                if has { "yes" } else { "no" },
                "{backend}, {device}"
            );
        }
        let version = version(&manifest).or_else(|| version(&workspace)).unwrap();
        assert_eq!(table["rust-version"][&backend], version, "{backend}");
    }
}

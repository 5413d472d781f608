//! SPEC.md and the cases that cite it agree.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use trainable_tokens_core::DType;
use trainable_tokens_testkit::vectors::{self, Vectors};
use trainable_tokens_testkit::{CITATIONS, tolerance};

const LONGEST_LINE: usize = 120;

fn spec() -> String {
    fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../SPEC.md")).unwrap()
}

/// The anchors, each with the text that it wraps.
fn anchors(spec: &str) -> Vec<(&str, &str)> {
    let parts = spec.split("<a id=\"").skip(1);
    let anchors = parts.map(|rest| {
        let (id, rest) = rest.split_once("\">").unwrap();
        (id, rest.split_once("</a>").unwrap().0)
    });
    anchors.collect()
}

fn clauses(spec: &str) -> BTreeSet<&str> {
    anchors(spec).into_iter().map(|(id, _)| id).collect()
}

fn is_clause_id(text: &str) -> bool {
    let digits = text.strip_prefix(|c: char| c.is_ascii_uppercase());
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[test]
fn ids_are_unique_and_anchors_equal_their_text() {
    let spec = spec();
    let mut seen = BTreeSet::new();
    for (id, text) in anchors(&spec) {
        assert!(is_clause_id(id), "{id} is no id of a clause");
        assert_eq!(id, text);
        assert!(seen.insert(id), "{id} occurs twice");
    }
    // Each clause is an item of a list, each item one of the clauses of its section, numbered from 1.
    let mut last = BTreeMap::new();
    let mut items = 0;
    for line in spec.lines().filter(|line| line.starts_with("- ")) {
        let (id, _) = line
            .strip_prefix("- <a id=\"")
            .unwrap_or_else(|| panic!("{line}"))
            .split_once('"')
            .unwrap();
        let number: u32 = id[1..].parse().unwrap();
        let before = last.insert(&id[..1], number).unwrap_or(0);
        assert_eq!(number, before + 1, "{id} is out of order");
        items += 1;
    }
    assert_eq!(items, seen.len());
}

#[test]
fn links_and_mentions_lead_to_clauses() {
    let spec = spec();
    let clauses = clauses(&spec);
    for rest in spec.split("](#").skip(1) {
        let (target, _) = rest.split_once(')').unwrap();
        assert!(!is_clause_id(target) || clauses.contains(target), "#{target}");
    }
    // Whatever looks like an id, but for the names of element types, which stand in code.
    let mut prose = spec
        .split('`')
        .step_by(2)
        .flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric()));
    let unknown: Vec<_> = prose
        .by_ref()
        .filter(|word| is_clause_id(word) && !clauses.contains(word))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn every_clause_is_cited_and_every_citation_is_one() {
    let spec = spec();
    let clauses = clauses(&spec);
    // The golden vectors have a runner of their own.
    let mut cited = BTreeSet::from([vectors::CLAUSE]);
    for (group, case, list) in CITATIONS {
        let list: Vec<_> = list.split(", ").collect();
        for id in &list {
            assert!(
                clauses.contains(id),
                "{group}::{case} cites {id:?}, which is no clause"
            );
            cited.insert(*id);
        }
        let once: BTreeSet<_> = list.iter().collect();
        assert_eq!(once.len(), list.len(), "{group}::{case} cites a clause twice");
    }
    let missing: Vec<_> = clauses.difference(&cited).copied().collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn golden_vectors_cite_clauses() {
    let spec = spec();
    let clauses = clauses(&spec);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/vectors.json");
    let vectors: Vectors = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for case in &vectors.cases {
        assert!(!case.clauses.is_empty(), "{} cites nothing", case.name);
        for id in &case.clauses {
            assert!(
                clauses.contains(id.as_str()),
                "{} cites {id:?}, which is no clause",
                case.name
            );
        }
    }
}

#[test]
fn names_of_cases_are_unique() {
    let names: BTreeSet<_> = CITATIONS
        .iter()
        .map(|(group, case, _)| (group.to_string(), case))
        .collect();
    assert_eq!(names.len(), CITATIONS.len());
}

#[test]
fn tolerances_are_those_of_the_kit() {
    let spec = spec();
    let mut tables = 0;
    let mut lines = spec.lines();
    while let Some(header) = lines.next() {
        let columns: Vec<_> = header.split('|').map(str::trim).collect();
        if columns.get(1) != Some(&"element type")
            || !columns.iter().any(|column| column.contains("tolerance"))
        {
            continue;
        }
        tables += 1;
        lines.next();
        let mut found = BTreeMap::new();
        for row in lines.by_ref().take_while(|line| line.starts_with('|')) {
            let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            found.insert(cells[1], cells[2].parse::<f64>().unwrap());
        }
        let kit = [DType::F64, DType::F32, DType::F16, DType::BF16];
        let names = kit.map(|dtype| dtype.to_string());
        let kit: BTreeMap<_, _> = names.iter().map(String::as_str).zip(kit.map(tolerance)).collect();
        assert_eq!(found, kit);
    }
    assert!(tables > 0);
}

#[test]
fn the_files_of_peft_are_those_of_the_fixtures() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    for (copy, fixture) in [
        ("tied", "llama_tied"),
        ("regex", "target_regex"),
        ("half", "standalone_bf16_noautocast"),
    ] {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let copy = fs::read(format!("{root}/crates/testkit/peft/{copy}/{file}")).unwrap();
            let original = fs::read(format!("{root}/tests/fixtures/peft/{fixture}/adapter/{file}")).unwrap();
            assert!(copy == original, "{file} of {fixture}");
        }
    }
}

#[test]
fn lines_are_not_too_long() {
    for (at, line) in spec().lines().enumerate() {
        let length = line.chars().count();
        assert!(length <= LONGEST_LINE, "line {} has {length} characters", at + 1);
    }
}

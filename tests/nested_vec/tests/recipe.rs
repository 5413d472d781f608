//! `docs/adding-a-backend.md` shows this crate, all of it, word for word.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const RECIPE: &str = "docs/adding-a-backend.md";
const EXAMPLE: &str = "tests/nested_vec";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The recipe's code blocks by the file that they name: ` ```rust title="PATH" `.
fn blocks() -> BTreeMap<String, Vec<String>> {
    let recipe = fs::read_to_string(root().join(RECIPE)).unwrap();
    let mut blocks: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // Between fences, every second piece is code.
    for code in recipe.split("\n```").skip(1).step_by(2) {
        let (info, code) = code.split_once('\n').unwrap();
        if let Some((_, title)) = info.split_once(" title=\"") {
            let path = title.trim_end_matches('"').to_owned();
            blocks.entry(path).or_default().push(format!("{code}\n"));
        } else {
            assert!(
                ["sh", "text"].contains(&info),
                "a block of {info} names no file: {code}"
            );
        }
    }
    blocks
}

#[test]
fn every_block_is_in_its_file() {
    let blocks = blocks();
    assert!(blocks.len() > 10, "only {} files are shown", blocks.len());
    for (path, blocks) in blocks {
        let file = fs::read_to_string(root().join(&path)).unwrap();
        for block in blocks {
            assert!(file.contains(&block), "{path} does not contain\n{block}");
        }
    }
}

#[test]
fn every_line_of_the_example_is_shown() {
    let (root, blocks) = (root(), blocks());
    let named = [
        "Cargo.toml",
        "tests/support/harness.rs",
        "tests/conformance.rs",
        "tests/fixtures.rs",
    ];
    let mut files: Vec<String> = named.iter().map(|path| format!("{EXAMPLE}/{path}")).collect();
    for entry in fs::read_dir(root.join(EXAMPLE).join("src")).unwrap() {
        files.push(format!(
            "{EXAMPLE}/src/{}",
            entry.unwrap().file_name().to_str().unwrap()
        ));
    }
    for path in files {
        let file = fs::read_to_string(root.join(&path)).unwrap();
        let shown = blocks
            .get(&path)
            .map(|blocks| blocks.concat())
            .unwrap_or_default();
        let lines = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|line| !line.is_empty())
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(
            lines(&shown),
            lines(&file),
            "{RECIPE} does not show all of {path} in order"
        );
    }
}

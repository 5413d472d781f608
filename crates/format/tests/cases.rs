//! Every case of PEFT: its files are read, checked against its base, resolved and merged to PEFT's bits.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::fixtures;
use trainable_tokens_core::{EmbeddingSource, HostTable, TokenId, TokenRows};
use trainable_tokens_format::{
    Adapter, AdapterModule, BaseCheck, Checkpoint, Error, ModelTables, SafetensorsFile,
};

/// A table's rows with those of a module in their places, in the table's type.
fn merged<T>(table: &T, module: &AdapterModule) -> TokenRows
where
    T: HostTable + EmbeddingSource<Error = Error>,
{
    let ids: Vec<_> = (0u32..).take(table.vocab_size()).map(TokenId).collect();
    let mut bytes = table.read_rows(&ids).unwrap().to_le_bytes();
    let row_bytes = table.embedding_dim() * table.dtype().size_in_bytes();
    let rows = module.rows().to_dtype(table.dtype()).to_le_bytes();
    for (row, id) in rows.chunks(row_bytes).zip(module.token_ids()) {
        bytes[id.row() * row_bytes..][..row_bytes].copy_from_slice(row);
    }
    TokenRows::from_le_bytes(table.dtype(), table.vocab_size(), table.embedding_dim(), &bytes).unwrap()
}

/// Compares a merged table with the one that PEFT computed.
fn same_as_peft(case: &Path, name: &str, ours: &TokenRows) {
    let expected = SafetensorsFile::open(case.join("expected.safetensors")).unwrap();
    let theirs = expected.tensor(name).unwrap().to_rows().unwrap();
    // Of a NaN that is rounded, the payload is the rounding's own.
    let bits = |rows: &TokenRows| {
        rows.to_f64_vec()
            .into_iter()
            .map(|x| if x.is_nan() { 1 } else { x.to_bits() })
    };
    let same =
        ours.shape() == theirs.shape() && ours.dtype() == theirs.dtype() && bits(ours).eq(bits(&theirs));
    assert!(same, "{}: {name}", case.display());
}

fn read(case: &Path, dir: &str) -> (Adapter, Checkpoint) {
    let base = Checkpoint::open(case.join("base")).unwrap();
    (Adapter::read(case.join(dir)).unwrap(), base)
}

#[test]
fn every_adapter_fits_its_base_and_targets_what_peft_did() {
    let mut seen = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let case = entry.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let unresized = name.starts_with("resized_vocab");
        // Made by hand, malformed, or of two sets of tokens over one table.
        if !case.join("adapter/adapter_config.json").exists()
            || ["tied_key_variants", "lora_dict_tied_different"].contains(&name.as_str())
        {
            continue;
        }
        let (adapter, _) = read(&case, "adapter");
        let base = Checkpoint::open(case.join(if unresized { "base_resized" } else { "base" })).unwrap();
        adapter
            .check_against(&base, BaseCheck::SameTable)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let model = ModelTables::of(&base).unwrap();
        let targets = model
            .targets(adapter.config())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let own = adapter
            .modules()
            .iter()
            .map(|module| (module.path(), module.token_indices()));
        let resolved = targets
            .iter()
            .map(|target| (target.path.as_str(), target.token_indices.as_slice()));
        assert_eq!(resolved.collect::<Vec<_>>(), own.collect::<Vec<_>>(), "{name}");
        seen += 1;
    }
    assert!(seen >= 34, "{seen}");
}

#[test]
fn merged_tables_are_those_of_peft() {
    let mut tables = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let case = entry.unwrap().path();
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        if !case.join("adapter/adapter_config.json").exists() || name == "lora_dict_tied_different" {
            continue;
        }
        let expected = SafetensorsFile::open(case.join("expected.safetensors")).unwrap();
        if name.starts_with("resized_vocab") {
            continue;
        }
        let (adapter, base) = read(&case, "adapter");
        for module in adapter.modules() {
            let names = [format!("merged.{}", module.path()), "merged.weight".to_owned()];
            for name in names.iter().filter(|name| expected.contains(name)) {
                let table = adapter.table(module.path(), &base).unwrap();
                same_as_peft(&case, name, &merged(&table, module));
                tables += 1;
            }
        }
    }
    assert!(tables >= 25, "{tables}");
}

#[test]
fn a_tied_head_is_the_embedding() {
    let case = fixtures().join("lora_dict_tied_same");
    let (adapter, base) = read(&case, "adapter");
    let table = adapter.table("lm_head", &base).unwrap();
    same_as_peft(&case, "merged.lm_head", &merged(&table, &adapter.modules()[0]));
}

#[test]
fn rows_that_are_not_finite_merge_as_they_are() {
    for case in ["merge_nan_f32", "merge_nan_bf16"] {
        let case = fixtures().join(case);
        for kind in ["fine", "huge", "inf", "nan"] {
            let (adapter, base) = read(&case, &format!("adapter_{kind}"));
            let module = &adapter.modules()[0];
            let table = adapter.table(module.path(), &base).unwrap();
            same_as_peft(&case, &format!("merged.{kind}"), &merged(&table, module));
            let finite = adapter.first_non_finite().is_none();
            assert_eq!(finite, ["fine", "huge"].contains(&kind), "{kind}");
        }
    }
}

#[test]
fn adapters_of_one_directory_merge_one_by_one() {
    let case = fixtures().join("multi_standalone");
    let (adapter, base) = read(&case, "adapter/first");
    let module = &adapter.modules()[0];
    let table = adapter.table(module.path(), &base).unwrap();
    same_as_peft(&case, "merged.first", &merged(&table, module));
}

#[test]
fn a_grown_vocabulary_merges_as_in_peft() {
    for (case, dirs, base) in [
        (
            "resized_vocab_tied",
            ["adapter", "adapter_true", "adapter"],
            "base",
        ),
        (
            "resized_vocab_tied",
            ["adapter", "adapter_true", "adapter_false"],
            "base_resized",
        ),
        (
            "resized_vocab",
            ["adapter", "adapter_true", "adapter_false"],
            "base_resized",
        ),
    ] {
        let case = fixtures().join(case);
        for dir in dirs {
            let adapter = Adapter::read(case.join(dir)).unwrap();
            let base = Checkpoint::open(case.join(base)).unwrap();
            let module = &adapter.modules()[0];
            let table = adapter.table(module.path(), &base).unwrap();
            same_as_peft(&case, "merged.embed", &merged(&table, module));
        }
    }
}

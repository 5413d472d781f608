//! Checkpoints, their tables and digests.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::fixtures;
use trainable_tokens_core::{BackendError as _, DType, EmbeddingSource, ErrorKind, HostTable as _, TokenId};
use trainable_tokens_format::{Checkpoint, Error, SafetensorsFile, digest};

/// A safetensors file of one header and some bytes.
fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_single_file_is_opened() {
    let base = Checkpoint::open(fixtures().join("llama_tied/base")).unwrap();
    assert!(base.contains("model.embed_tokens.weight"));
    assert!(!base.contains("lm_head.weight"));
    assert!(base.config_path().is_file());
    let tensor = base.tensor("model.embed_tokens.weight").unwrap();
    let table = base.table("model.embed_tokens.weight").unwrap();
    assert_eq!(tensor.shape, [table.vocab_size(), table.embedding_dim()]);
    assert_eq!(tensor.bytes, table.bytes());
    assert_eq!(tensor.file, base.shard_of("model.embed_tokens.weight").unwrap());
    let error = base.table("embed_tokens.weight").unwrap_err().to_string();
    assert!(
        error.contains("there is \"model.embed_tokens.weight\""),
        "{error}"
    );
    assert_eq!(
        base.table("model.norm.weight").unwrap_err().kind(),
        ErrorKind::Shape
    );
}

#[test]
fn shards_are_opened_by_the_index() {
    let base = Checkpoint::open(fixtures().join("qwen2_sharded/base")).unwrap();
    assert_eq!(base.files().len(), 3);
    for name in base.names() {
        base.tensor(name).unwrap();
    }
    let names: Vec<_> = base.names().collect();
    assert!(names.is_sorted());
    let shard = base.shard_of("model.embed_tokens.weight").unwrap();
    let index = fs::read_to_string(base.dir().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let expected = index["weight_map"]["model.embed_tokens.weight"].as_str().unwrap();
    assert!(shard.ends_with(expected));
}

#[test]
fn shards_in_memory_are_those_of_the_directory() {
    let dir = fixtures().join("qwen2_sharded/base");
    let index = fs::read(dir.join("model.safetensors.index.json")).unwrap();
    let in_memory = |path: &Path| SafetensorsFile::from_bytes(path, fs::read(path).unwrap());
    let memory = Checkpoint::from_parts(&dir, index, in_memory).unwrap();
    let mapped = Checkpoint::open(&dir).unwrap();
    assert!(memory.names().eq(mapped.names()));
    for name in mapped.names() {
        let (a, b) = (memory.tensor(name).unwrap(), mapped.tensor(name).unwrap());
        assert_eq!((a.shape, a.bytes, a.file), (b.shape, b.bytes, b.file));
    }
}

#[test]
fn a_table_has_columns_that_memory_can_have() {
    for shape in ["[4294967295,0]", "[0,4611686018427387904]"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        let file = SafetensorsFile::from_bytes("model.safetensors", file_of(&header, &[])).unwrap();
        assert_eq!(file.table("a").unwrap_err().kind(), ErrorKind::Shape, "{shape}");
    }
}

#[test]
fn an_id_beyond_wide_rows_is_no_row() {
    let header = r#"{"a":{"dtype":"F16","shape":[0,4611686018427387904],"data_offsets":[0,0]}}"#;
    let file = SafetensorsFile::from_bytes("model.safetensors", file_of(header, &[])).unwrap();
    let table = file.table("a").unwrap();
    assert!(table.row(TokenId(u32::MAX)).is_none());
    assert_eq!(
        table.read_rows(&[TokenId(3)]).unwrap_err().kind(),
        ErrorKind::TokenOutOfRange
    );
    assert_eq!(digest(&table).unwrap(), table.digest());
}

const SHARD: &str = "model-00002-of-00003.safetensors";

/// Replaces a part of the index.
fn edit(dir: &Path, from: &str, to: &str) {
    let path = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn an_index_is_not_trusted() {
    let check = |change: fn(&Path), part: &str| {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(&fixtures().join("qwen2_sharded/base"), dir.path());
        Checkpoint::open(dir.path()).unwrap();
        change(dir.path());
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{part}: {error}");
    };
    check(
        |dir| fs::remove_file(dir.join(SHARD)).unwrap(),
        "00002-of-00003.safetensors does not exist",
    );
    check(
        |dir| edit(dir, SHARD, "../model-00002-of-00003.safetensors"),
        "not a plain file name",
    );
    check(|dir| edit(dir, SHARD, "/etc/passwd"), "not a plain file name");
    check(|dir| edit(dir, SHARD, ".."), "not a plain file name");
    check(|dir| edit(dir, SHARD, "a/b.safetensors"), "not a plain file name");
    check(
        |dir| edit(dir, SHARD, "model-00003-of-00003.safetensors"),
        "puts it there",
    );
    check(|dir| edit(dir, "\"weight_map\"", "\"weight_mop\""), "weight_map");
    check(|dir| edit(dir, "{", "["), "is not valid JSON");
    check(
        |dir| edit(dir, "\"weight_map\": {", "\"weight_map\": {\"a\": 3, "),
        "weight_map",
    );
    check(
        |dir| {
            edit(
                dir,
                "\"weight_map\": {",
                "\"weight_map\": {\"a\": \"x\", \"a\": \"x\", ",
            );
        },
        "occurs twice",
    );
    check(
        |dir| {
            let bytes = fs::read(dir.join(SHARD)).unwrap();
            fs::write(dir.join(SHARD), &bytes[..bytes.len() - 1]).unwrap();
        },
        SHARD,
    );
    check(
        |dir| assert!(fs::copy(dir.join("model-00001-of-00003.safetensors"), dir.join(SHARD)).unwrap() > 0),
        "is also in",
    );
}

#[test]
fn a_directory_without_weights_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors does not exist"), "{error}");
    fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
}

#[test]
fn arrays_and_files_have_the_same_digest() {
    for case in ["standalone_f32", "standalone_bf16", "standalone_f16"] {
        let base = Checkpoint::open(fixtures().join(case).join("base")).unwrap();
        let table = base.table("emb.weight").unwrap();
        let ids: Vec<_> = (0..37).map(TokenId).collect();
        let array = table.read_rows(&ids).unwrap();
        assert_eq!(digest(&array).unwrap(), table.digest());
        assert_eq!(digest(&table).unwrap(), table.digest());
        assert!(table.digest().to_string().starts_with("sha256:"));
    }
    // More than one chunk of rows.
    let data: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
    let header = r#"{"w":{"dtype":"F64","shape":[125,3000],"data_offsets":[0,3000000]}}"#;
    let file = SafetensorsFile::from_bytes("x", file_of(header, &data)).unwrap();
    let table = file.table("w").unwrap();
    assert_eq!(digest(&table).unwrap(), table.digest());
}

#[test]
fn rows_are_read_bit_for_bit() {
    let base = Checkpoint::open(fixtures().join("standalone_bf16/base")).unwrap();
    let table = base.table("emb.weight").unwrap();
    assert_eq!(table.dtype(), DType::BF16);
    let rows = table.read_rows(&[TokenId(36), TokenId(0), TokenId(36)]).unwrap();
    let bytes = table.bytes();
    assert_eq!(
        rows.to_le_bytes(),
        [&bytes[36 * 16..], &bytes[..16], &bytes[36 * 16..]].concat()
    );
    assert!(table.row(TokenId(37)).is_none());
    assert!(table.row(TokenId(u32::MAX)).is_none());
    assert_eq!(
        table.read_rows(&[TokenId(37)]).unwrap_err().kind(),
        ErrorKind::TokenOutOfRange
    );
}

#[test]
fn tables_are_float_matrices() {
    let header = r#"{"i":{"dtype":"I64","shape":[1,1],"data_offsets":[0,8]},
        "v":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"e":{"dtype":"F32","shape":[0,4],"data_offsets":[16,16]},
        "n":{"dtype":"F32","shape":[8589934592,0],"data_offsets":[16,16]}}"#;
    let file = SafetensorsFile::from_bytes("x", file_of(header, &[0; 16])).unwrap();
    assert_eq!(file.table("i").unwrap_err().kind(), ErrorKind::DType);
    assert_eq!(file.table("v").unwrap_err().kind(), ErrorKind::Shape);
    assert_eq!(file.table("n").unwrap_err().kind(), ErrorKind::TokenOutOfRange);
    assert_eq!(file.table("e").unwrap().vocab_size(), 0);
    assert_eq!(file.names().collect::<Vec<_>>(), ["e", "i", "n", "v"]);
    assert!(file.metadata().is_none());
}

#[test]
fn a_large_header_is_refused_before_it_is_parsed() {
    let header = " ".repeat((12 << 20) + 1);
    let error = SafetensorsFile::from_bytes("x", file_of(&header, b"")).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[test]
fn names_with_line_breaks_stay_on_one_line() {
    let header = r#"{"a\nb":{"dtype":"F\n9","shape":[],"data_offsets":[0,0]}}"#;
    let error = SafetensorsFile::from_bytes("p\nq", file_of(header, b"")).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
}

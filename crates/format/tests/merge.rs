//! Merging equals PEFT's `merge_and_unload`, bit for bit, and touches nothing else.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{fixtures, tree};
use trainable_tokens_core::{BackendError as _, EmbeddingSource as _, ErrorKind, TokenId, TokenRows};
use trainable_tokens_format::{
    Adapter, Checkpoint, Error, MergeReport, Overwrite, RowReplacement, merge_checkpoint,
};

fn merge(case: &str, out: &Path) -> (Checkpoint, MergeReport) {
    let base = Checkpoint::open(fixtures().join(case).join("base")).unwrap();
    let adapter = Adapter::read(fixtures().join(case).join("adapter")).unwrap();
    let replacements = adapter.replacements(&base).unwrap();
    let report = merge_checkpoint(&base, &replacements, out, Overwrite::Refuse).unwrap();
    (base, report)
}

fn replacement(tensor: &str, ids: &[u32], dim: usize) -> RowReplacement {
    let rows = TokenRows::new(vec![1f32; ids.len() * dim], ids.len(), dim).unwrap();
    let ids = ids.iter().copied().map(TokenId).collect();
    RowReplacement {
        tensor: tensor.to_owned(),
        ids,
        rows,
    }
}

#[test]
fn merged_tensors_equal_those_of_peft() {
    for case in ["llama_tied", "llama_untied", "qwen2_sharded"] {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("merged");
        let (base, report) = merge(case, &out);
        let ours = Checkpoint::open(&out).unwrap();
        let theirs = Checkpoint::open(fixtures().join(case).join("merged")).unwrap();
        assert_eq!(
            ours.names().collect::<Vec<_>>(),
            theirs.names().collect::<Vec<_>>()
        );
        for name in theirs.names() {
            let (a, b) = (ours.tensor(name).unwrap(), theirs.tensor(name).unwrap());
            assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{case}: {name}");
            assert!(a.bytes == b.bytes, "{case}: {name}");
        }
        let adapter = Adapter::read(fixtures().join(case).join("adapter")).unwrap();
        assert_eq!(report.rows, adapter.modules()[0].token_ids().len());
        assert_eq!(report.rewritten.len(), 1);
        assert_eq!(report.shared.len(), base.files().len() - 1);
        assert!(report.left_out.is_empty());
    }
}

#[test]
fn a_single_file_is_that_of_peft_byte_for_byte() {
    for case in ["llama_tied", "llama_untied"] {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("merged");
        merge(case, &out);
        let file = Path::new("model.safetensors");
        let theirs = fs::read(fixtures().join(case).join("merged").join(file)).unwrap();
        assert!(fs::read(out.join(file)).unwrap() == theirs, "{case}");
    }
}

#[test]
fn other_files_are_the_same() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("merged");
    let (base, report) = merge("qwen2_sharded", &out);
    let (before, after) = (tree(base.dir()), tree(&out));
    assert_eq!(before.len(), after.len());
    for ((name, old), (also, new)) in before.iter().zip(&after) {
        assert_eq!(name, also);
        assert_eq!(old.len(), new.len());
        assert_eq!(old != new, report.rewritten.contains(name), "{}", name.display());
    }
    assert_eq!(report.copied.len(), 3);
}

#[test]
fn weights_in_other_forms_and_hidden_files_are_left_out() {
    let home = tempfile::tempdir().unwrap();
    let base = home.path().join("base");
    fs::create_dir_all(base.join("sub/.git")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures().join("llama_tied/base").join(name), base.join(name)).unwrap();
    }
    for name in [
        "pytorch_model.bin",
        "sub/old.safetensors",
        "sub/note.txt",
        "sub/.git/x",
        ".hidden",
        "model.safetensors.index.json",
    ] {
        fs::write(base.join(name), name).unwrap();
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(base.join("config.json"), base.join("linked.json")).unwrap();
    let base = Checkpoint::open(base).unwrap();
    let out = home.path().join("out");
    let replacements = [replacement("model.embed_tokens.weight", &[3], 40)];
    let report = merge_checkpoint(&base, &replacements, &out, Overwrite::Refuse).unwrap();
    assert_eq!(
        report.left_out,
        [
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "sub/old.safetensors"
        ]
        .map(PathBuf::from)
    );
    let found: Vec<_> = tree(&out).into_iter().map(|(name, _)| name).collect();
    #[cfg(unix)]
    assert_eq!(
        found,
        ["config.json", "linked.json", "model.safetensors", "sub/note.txt"].map(PathBuf::from)
    );
    assert!(!out.join("linked.json").is_symlink());
}

#[test]
fn rows_are_rounded_to_the_type_of_the_table() {
    let home = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(fixtures().join("standalone_bf16/base")).unwrap();
    let mut change = replacement("emb.weight", &[36, 0], 8);
    change.rows = TokenRows::new(vec![0.1f32; 16], 2, 8).unwrap();
    let out = home.path().join("out");
    merge_checkpoint(&base, &[change.clone()], &out, Overwrite::Refuse).unwrap();
    let table = Checkpoint::open(&out).unwrap().table("emb.weight").unwrap();
    let rows = table.read_rows(&change.ids).unwrap();
    assert!(rows.bits_eq(&change.rows.to_dtype(table.dtype())));
}

#[test]
fn what_cannot_be_merged_is_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(fixtures().join("standalone_f32/base")).unwrap();
    let refuse = |replacements: &[RowReplacement]| {
        let out = home.path().join("out");
        let error = merge_checkpoint(&base, replacements, &out, Overwrite::Refuse).unwrap_err();
        assert!(!out.exists());
        error
    };
    assert!(matches!(
        refuse(&[replacement("wte.weight", &[1], 8)]),
        Error::TensorMissing { .. }
    ));
    assert_eq!(
        refuse(&[replacement("emb.weight", &[1, 37], 8)]).kind(),
        ErrorKind::TokenOutOfRange
    );
    assert_eq!(
        refuse(&[replacement("emb.weight", &[1], 7)]).kind(),
        ErrorKind::Shape
    );
    let one = replacement("emb.weight", &[1, 5], 8);
    assert_eq!(refuse(&[one.clone(), one]).kind(), ErrorKind::DuplicateToken);
}

#[test]
fn the_base_is_never_the_output() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("models/base");
    fs::create_dir_all(&dir).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures().join("standalone_f32/base").join(name), dir.join(name)).unwrap();
    }
    fs::write(home.path().join("models/config.json"), "{}").unwrap();
    let base = Checkpoint::open(&dir).unwrap();
    let before = tree(home.path());
    let mut outs = vec![
        dir.clone(),
        dir.join("inside"),
        dir.join("../base/"),
        home.path().join("models"),
    ];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&dir, home.path().join("link")).unwrap();
        outs.push(home.path().join("link"));
        outs.push(home.path().join("link/deep/er"));
    }
    for out in outs {
        let change = [replacement("emb.weight", &[1], 8)];
        let refused = merge_checkpoint(&base, &change, &out, Overwrite::Replace);
        assert!(
            matches!(refused, Err(Error::Target { .. })),
            "{}: {refused:?}",
            out.display()
        );
    }
    #[cfg(unix)]
    fs::remove_file(home.path().join("link")).unwrap();
    assert_eq!(tree(home.path()), before);
}

/// As checkpoints in shared caches are.
#[test]
#[cfg(unix)]
fn a_base_that_cannot_be_written_is_merged() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("base");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("model.safetensors");
    fs::copy(fixtures().join("llama_tied/base/model.safetensors"), &file).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    let base = Checkpoint::open(&dir).unwrap();
    let before = tree(&dir);
    let out = home.path().join("out");
    // Rows that follow each other, the first and the last.
    let change = replacement("model.embed_tokens.weight", &[279, 1, 0, 278, 2], 40);
    merge_checkpoint(&base, std::slice::from_ref(&change), &out, Overwrite::Refuse).unwrap();
    assert_eq!(tree(&dir), before);
    let (old, new) = (base, Checkpoint::open(&out).unwrap());
    for name in old.names() {
        let (old, new) = (old.tensor(name).unwrap(), new.tensor(name).unwrap());
        let mut expected = old.bytes.to_vec();
        if name == change.tensor {
            for id in &change.ids {
                let one = 1f32.to_le_bytes().repeat(40);
                expected[id.row() * one.len()..][..one.len()].copy_from_slice(&one);
            }
        }
        assert!(new.bytes == expected, "{name}");
    }
}

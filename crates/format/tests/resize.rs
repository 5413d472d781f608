//! Rows for new tokens, in the checkpoints of several architectures.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::Path;

use common::fixtures;
use serde_json::{Value, json};
use trainable_tokens_core::{BackendError as _, EmbeddingSource as _, ErrorKind, RowInit, TokenId};
use trainable_tokens_format::{Checkpoint, Error, Overwrite, Resize, ResizeReport};

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(fixtures().join(name).join("base")).unwrap()
}

fn resized<'a>(base: &'a Checkpoint, tokens: &[(usize, &str)]) -> Resize<'a> {
    let mut resize = Resize::new(base).unwrap();
    for (id, init) in tokens {
        let id = TokenId(u32::try_from(*id).unwrap());
        resize = resize.token(id, init.parse::<RowInit>().unwrap());
    }
    resize
}

fn write(resize: &Resize<'_>, out: &Path) -> (Checkpoint, ResizeReport) {
    let report = resize.write(out, Overwrite::Refuse).unwrap();
    (Checkpoint::open(out).unwrap(), report)
}

/// The numbers of a tensor of F32.
fn floats(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = checkpoint.tensor(name).unwrap().bytes.chunks_exact(4);
    bytes
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// Tables and biases of every architecture grow, whatever their names; all else is as before.
#[test]
fn all_tensors_of_the_vocabulary_grow() {
    let cases: [(&str, &[&str]); 5] = [
        (
            "bert_mlm",
            &["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
        ),
        ("t5_tied", &["shared.weight"]),
        ("gpt2_tied", &["transformer.wte.weight"]),
        ("bart_tied", &["final_logits_bias", "model.shared.weight"]),
        ("llama_untied", &["lm_head.weight", "model.embed_tokens.weight"]),
    ];
    for (name, changed) in cases {
        let (base, home) = (open(name), tempfile::tempdir().unwrap());
        let vocab_size = Resize::new(&base).unwrap().vocab_size_before();
        let resize = resized(&base, &[(vocab_size, "copy:5"), (vocab_size + 1, "mean-of:7,9")]);
        let (model, report) = write(&resize, &home.path().join("out"));
        assert_eq!(
            [report.vocab_size_before, report.vocab_size],
            [vocab_size, vocab_size + 2],
            "{name}"
        );
        assert_eq!(report.merge.tensors, changed, "{name}");
        assert_eq!(
            base.names().collect::<Vec<_>>(),
            model.names().collect::<Vec<_>>()
        );
        for tensor in base.names() {
            let (before, after) = (base.tensor(tensor).unwrap(), model.tensor(tensor).unwrap());
            if !changed.contains(&tensor) {
                assert!(
                    before.bytes == after.bytes && before.shape == after.shape,
                    "{name}: {tensor}"
                );
                continue;
            }
            let grown = |size: &usize| {
                if *size == vocab_size {
                    vocab_size + 2
                } else {
                    *size
                }
            };
            assert_eq!(
                after.shape,
                before.shape.iter().map(grown).collect::<Vec<_>>(),
                "{tensor}"
            );
            assert!(after.bytes.starts_with(before.bytes), "{name}: {tensor}");
            let values = floats(&model, tensor);
            let dim = values.len() / (vocab_size + 2);
            let row = |id: usize| &values[id * dim..(id + 1) * dim];
            assert_eq!(row(vocab_size), row(5), "{name}: {tensor}");
            let mean: Vec<f32> = row(7)
                .iter()
                .zip(row(9))
                .map(|(a, b)| f32::midpoint(*a, *b))
                .collect();
            assert_eq!(row(vocab_size + 1), mean, "{name}: {tensor}");
        }
        let [before, after] = [&base, &model].map(|model| read_json(&model.config_path()));
        assert_eq!(after["vocab_size"], json!(vocab_size + 2), "{name}");
        let without = |config: &Value| {
            let mut fields = config.as_object().unwrap().clone();
            fields.remove("vocab_size");
            fields
        };
        assert_eq!(without(&before), without(&after), "{name}");
    }
}

/// Rows that are there are taken as they are; what is missing is the mean of what was there.
#[test]
fn rows_are_taken_and_padded() {
    let (base, home) = (open("llama_untied"), tempfile::tempdir().unwrap());
    let names = ["lm_head.weight", "model.embed_tokens.weight"];
    // 300 rows: the last two are free, say.
    let (kept, report) = write(
        &resized(&base, &[(298, "keep"), (299, "zeros")]),
        &home.path().join("kept"),
    );
    assert_eq!([report.vocab_size_before, report.vocab_size], [300, 300]);
    for name in names {
        let (before, after) = (floats(&base, name), floats(&kept, name));
        let dim = before.len() / 300;
        assert_eq!(before[..299 * dim], after[..299 * dim]);
        assert_eq!(after[299 * dim..], vec![0.0; dim]);
    }
    assert_eq!(read_json(&base.config_path()), read_json(&kept.config_path()));

    let resize =
        resized(&base, &[(299, "copy:3"), (300, "mean")]).pad_to_multiple_of(NonZero::new(64).unwrap());
    let (padded, report) = write(&resize, &home.path().join("padded"));
    assert_eq!(
        (
            report.vocab_size,
            read_json(&padded.config_path())["vocab_size"].as_u64()
        ),
        (320, Some(320))
    );
    for name in names {
        let (before, after) = (floats(&base, name), floats(&padded, name));
        let dim = before.len() / 300;
        assert_eq!(after[299 * dim..300 * dim], before[3 * dim..4 * dim]);
        for column in 0..dim {
            let mean = (0..300)
                .map(|row| f64::from(before[row * dim + column]))
                .sum::<f64>()
                / 300.0;
            for row in 300..320 {
                assert!(
                    (f64::from(after[row * dim + column]) - mean).abs() < 1e-7,
                    "{name}, row {row}"
                );
            }
        }
    }
    // A multiple alone never shrinks.
    let (same, _) = write(
        &Resize::new(&base)
            .unwrap()
            .pad_to_multiple_of(NonZero::new(4).unwrap()),
        &home.path().join("same"),
    );
    assert_eq!(same.table(names[0]).unwrap().vocab_size(), 300);
}

#[test]
fn shards_that_hold_no_table_are_shared() {
    let (base, home) = (open("qwen2_sharded"), tempfile::tempdir().unwrap());
    let vocab_size = Resize::new(&base).unwrap().vocab_size_before();
    let out = home.path().join("out");
    let resize = resized(&base, &[(vocab_size, "mean+noise:0.1")]).file("tokenizer.json", b"{}".to_vec());
    let (model, report) = write(&resize, &out);
    let merge = &report.merge;
    assert!(!merge.shared.is_empty());
    for name in &merge.shared {
        assert_eq!(
            fs::read(out.join(name)).unwrap(),
            fs::read(base.dir().join(name)).unwrap()
        );
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt as _;
            let inode = |dir: &Path| fs::metadata(dir.join(name)).unwrap().ino();
            assert!(
                inode(&out) == inode(base.dir())
                    || fs::metadata(&out).unwrap().dev() != fs::metadata(base.dir()).unwrap().dev()
            );
        }
    }
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), b"{}");
    let size =
        |dir: &Path| read_json(&dir.join("model.safetensors.index.json"))["metadata"]["total_size"].as_u64();
    let added: usize = merge
        .tensors
        .iter()
        .map(|name| {
            let table = model.table(name).unwrap();
            table.embedding_dim() * table.dtype().size_in_bytes()
        })
        .sum();
    assert_eq!(size(&out).unwrap() - size(base.dir()).unwrap(), added as u64);
}

#[test]
fn what_cannot_be_is_refused() {
    let (base, home) = (open("llama_untied"), tempfile::tempdir().unwrap());
    let out = home.path().join("out");
    let refused = |tokens: &[(usize, &str)], parts: &[&str]| {
        let error = resized(&base, tokens)
            .write(&out, Overwrite::Refuse)
            .unwrap_err()
            .to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!out.exists());
    };
    refused(&[(300, "keep")], &["300", "no row"]);
    refused(&[(300, "keep+noise:1")], &["300", "no row"]);
    refused(&[(300, "copy:300")], &["300"]);
    refused(&[(300, "mean"), (300, "mean")], &["300"]);
    let inside = resized(&base, &[(300, "mean")]).write(base.dir().join("out"), Overwrite::Refuse);
    assert!(matches!(inside, Err(Error::Target { .. })));

    // Nothing tells which table is the embedding, or they do not agree.
    let unknown = home.path().join("unknown");
    fs::create_dir(&unknown).unwrap();
    let file = fixtures().join("llama_untied/base/model.safetensors");
    fs::copy(file, unknown.join("model.safetensors")).unwrap();
    let error = Resize::new(&Checkpoint::open(&unknown).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let tensors = BTreeMap::from([
        ("model.embed_tokens.weight", [3usize, 2]),
        ("lm_head.weight", [4, 2]),
    ]);
    let bytes = [0; 32];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = &bytes[..shape[0] * shape[1] * 4];
        (
            name,
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap(),
        )
    });
    fs::write(
        unknown.join("model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
    let config =
        json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false, "vocab_size": 3});
    fs::write(unknown.join("config.json"), config.to_string()).unwrap();
    let error = Resize::new(&Checkpoint::open(&unknown).unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("lm_head.weight has 4") && error.contains("3 rows"),
        "{error}"
    );
}

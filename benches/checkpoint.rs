//! Opening a checkpoint, digesting its table, saving and loading an adapter, merging.
//!
//! `cargo bench --bench checkpoint`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use criterion::{Criterion, criterion_group, criterion_main};
use support::{DIM, table, trained_ids};
use trainable_tokens::format::{Adapter, Checkpoint, Overwrite, RowReplacement, merge_checkpoint};
use trainable_tokens::{EmbeddingSource, TokenSet};

const V: usize = 32_000;
const TENSOR: &str = "model.embed_tokens.weight";

fn files(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    std::fs::create_dir(&base).unwrap();
    let bytes: Vec<u8> = table(V).iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![V, DIM], &bytes).unwrap();
    safetensors::serialize_to_file([(TENSOR, view)], None, &base.join("model.safetensors")).unwrap();
    std::fs::write(base.join("config.json"), "{}").unwrap();

    let mut group = criterion.benchmark_group("checkpoint");
    group.sample_size(10);
    group.bench_function("open", |b| b.iter(|| Checkpoint::open(&base).unwrap()));
    let checkpoint = Checkpoint::open(&base).unwrap();
    let mapped = checkpoint.table(TENSOR).unwrap();
    group.bench_function("digest of the table", |b| b.iter(|| mapped.digest()));
    let tokens = TokenSet::new(trained_ids(V), V).unwrap();
    let rows = mapped.read_rows(tokens.ids()).unwrap();
    let adapter = Adapter::builder("model.embed_tokens", &tokens, rows.clone())
        .build()
        .unwrap();
    let saved = dir.path().join("adapter");
    group.bench_function("save an adapter", |b| {
        b.iter(|| adapter.write(&saved, Overwrite::Replace).unwrap());
    });
    group.bench_function("load an adapter", |b| b.iter(|| Adapter::read(&saved).unwrap()));
    let replacement = RowReplacement {
        tensor: TENSOR.to_owned(),
        ids: tokens.ids().to_vec(),
        rows,
    };
    group.bench_function("merge", |b| {
        b.iter(|| {
            merge_checkpoint(
                &checkpoint,
                std::slice::from_ref(&replacement),
                &out,
                Overwrite::Replace,
            )
            .unwrap()
        });
    });
}

criterion_group!(benches, files);
criterion_main!(benches);

//! Opening a checkpoint, digesting its table, saving and loading an adapter, merging; beside copying the file.
//!
//! `cargo bench --bench checkpoint`
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "support/workload.rs"]
mod workload;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use trainable_tokens::EmbeddingSource;
use trainable_tokens::format::{Adapter, Checkpoint, Overwrite, RowReplacement, merge_checkpoint};
use workload::Workload;

const TENSOR: &str = "model.embed_tokens.weight";

fn files(criterion: &mut Criterion) {
    let workload = Workload::of(32_000);
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    std::fs::create_dir(&base).unwrap();
    let bytes: Vec<u8> = workload
        .table::<f32>()
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let shape = vec![workload.vocab_size, workload.dim];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes).unwrap();
    safetensors::serialize_to_file([(TENSOR, view)], None, &base.join("model.safetensors")).unwrap();
    std::fs::write(base.join("config.json"), "{}").unwrap();

    let mut group = criterion.benchmark_group("checkpoint");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    group.bench_function("open", |b| b.iter(|| Checkpoint::open(&base).unwrap()));
    let checkpoint = Checkpoint::open(&base).unwrap();
    let mapped = checkpoint.table(TENSOR).unwrap();
    group.bench_function("digest of the table", |b| b.iter(|| mapped.digest()));
    for rows in [1, 128, 10_000] {
        let workload = Workload { rows, ..workload };
        let tokens = workload.token_set();
        let trained = mapped.read_rows(tokens.ids()).unwrap();
        let adapter = Adapter::builder("model.embed_tokens", &tokens, trained.clone())
            .build()
            .unwrap();
        let saved = dir.path().join("adapter");
        group.bench_function(format!("save an adapter/k={rows}"), |b| {
            b.iter(|| adapter.write(&saved, Overwrite::Replace).unwrap());
        });
        group.bench_function(format!("load an adapter/k={rows}"), |b| {
            b.iter(|| Adapter::read(&saved).unwrap());
        });
        let replacement = RowReplacement {
            tensor: TENSOR.to_owned(),
            ids: tokens.ids().to_vec(),
            rows: trained,
        };
        group.bench_function(format!("merge/k={rows}"), |b| {
            b.iter(|| {
                let replacements = std::slice::from_ref(&replacement);
                merge_checkpoint(&checkpoint, replacements, &out, Overwrite::Replace).unwrap()
            });
        });
    }
    group.bench_function("copy the file", |b| {
        b.iter(|| std::fs::copy(base.join("model.safetensors"), dir.path().join("copy")).unwrap());
    });
}

criterion_group!(benches, files);
criterion_main!(benches);

//! Merging, extracting and comparing take no memory for a table, only for its rows that change.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;
use trainable_tokens_core::{MergeCheck, RowInit, TokenId, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, AdapterDiff, BaseCheck, Checkpoint, CheckpointDiff, Extract, Merge, Overwrite,
    Resize, TokenIndices,
};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const VOCAB_SIZE: usize = 64_000;
const DIM: usize = 512;
const TABLE_BYTES: usize = VOCAB_SIZE * DIM * 2;
const TOKENS: usize = 16;
/// Rows of the tensor that LoRA changes, 16 MB.
const OUTPUTS: usize = VOCAB_SIZE / 4;
/// A block of a tensor, decoded and encoded, for each of eight threads, and what belongs to files and names.
const LIMIT: usize = 8 << 20;
const EMBEDDING: &str = "model.embed_tokens.weight";
const LINEAR: &str = "model.layers.0.mlp.up_proj.weight";

/// A model of a table of 64 MB and another tensor, in bf16, written without holding them.
fn make(dir: &Path) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    let config =
        json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true, "vocab_size": VOCAB_SIZE});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let total = TABLE_BYTES + OUTPUTS * DIM * 2;
    let header = json!({
        EMBEDDING: {"dtype": "BF16", "shape": [VOCAB_SIZE, DIM], "data_offsets": [0, TABLE_BYTES]},
        LINEAR: {"dtype": "BF16", "shape": [OUTPUTS, DIM], "data_offsets": [TABLE_BYTES, total]},
    });
    let header = header.to_string();
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for row in 0..VOCAB_SIZE + OUTPUTS {
        let value = [u8::try_from(row % 251).unwrap(), 0x3c];
        file.write_all(&value.repeat(DIM)).unwrap();
    }
    file.flush().unwrap();
    Checkpoint::open(dir).unwrap()
}

fn adapter(base: &Checkpoint, lora: bool) -> Adapter {
    let ids = (0..TOKENS).map(|slot| u32::try_from(slot * 3999).unwrap());
    let tokens = TokenSet::new(ids, VOCAB_SIZE).unwrap();
    let rows = TokenRows::new(vec![0.5f32; TOKENS * DIM], TOKENS, DIM).unwrap();
    let table = base.table(EMBEDDING).unwrap();
    let mut builder = Adapter::builder("model.embed_tokens", &tokens, rows)
        .tied("lm_head")
        .base(table.digest(), trainable_tokens_core::DType::BF16);
    if lora {
        let config = AdapterConfig::lora(&TokenIndices::ByModule(BTreeMap::new())).unwrap();
        let config = config.with_field("r", &1.into()).unwrap();
        builder = builder.lora(config.with_field("target_modules", &json!(["up_proj"])).unwrap());
        for (factor, shape) in [("A", [1, DIM]), ("B", [OUTPUTS, 1])] {
            let name = format!("base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight");
            let bytes = vec![0u8; 4 * shape[0] * shape[1]];
            builder = builder.extra_tensor(name, Dtype::F32, shape, bytes);
        }
    }
    builder.build().unwrap()
}

/// Does some work; the number of bytes that lived at once.
fn cost<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let (value, cost) = allocated(work).unwrap();
    println!(
        "{what}: {} bytes at once, the largest {}",
        cost.growth, cost.largest
    );
    assert!(cost.growth < LIMIT, "{what}: {} bytes", cost.growth);
    value
}

/// One test: the counts are those of the whole process.
#[test]
fn a_table_is_never_in_memory() {
    let home = tempfile::tempdir().unwrap();
    let base = make(&home.path().join("base"));
    let rows = adapter(&base, false);
    let out = home.path().join("out");
    cost("merge", || {
        let merge = Merge::new(&base)
            .base_check(BaseCheck::SameTable)
            .check(MergeCheck::Finite);
        let merge = merge.with("rows", &rows).unwrap();
        merge.write(&out, Overwrite::Refuse).unwrap()
    });
    let lora = adapter(&base, true);
    cost("merge with LoRA", || {
        let merge = Merge::new(&base)
            .check(MergeCheck::Finite)
            .with("lora", &lora)
            .unwrap();
        merge.write(home.path().join("lora"), Overwrite::Refuse).unwrap()
    });
    cost("resize", || {
        let init: RowInit = "mean+norm-match".parse().unwrap();
        let id = |added: usize| TokenId(u32::try_from(VOCAB_SIZE + added).unwrap());
        let resize = Resize::new(&base)
            .unwrap()
            .token(id(0), init.clone())
            .token(id(1), init);
        resize
            .write(home.path().join("resized"), Overwrite::Refuse)
            .unwrap()
    });
    let tuned = Checkpoint::open(&out).unwrap();
    let extracted = cost("extract", || Extract::new(&base, &tuned).adapter().unwrap());
    assert_eq!(extracted.modules()[0].token_indices().len(), TOKENS);
    let diff = cost("diff of models", || {
        CheckpointDiff::between(&base, &tuned).unwrap()
    });
    let rows_apart = cost("rows of the diff", || {
        diff.tables[0].rows(&base, &tuned).unwrap().count()
    });
    assert_eq!((diff.tables.len(), rows_apart), (1, TOKENS));
    cost("diff of adapters", || {
        AdapterDiff::between(&rows, &extracted).unwrap()
    });
    cost("save and load an adapter", || {
        rows.write(home.path().join("saved"), Overwrite::Refuse).unwrap();
        Adapter::read(home.path().join("saved")).unwrap()
    });
}

//! Merges of adapters whose vocabulary has grown: larger tensors, and a model that says so.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{fixtures, tree};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use trainable_tokens_core::{BackendError as _, ErrorKind, MergeCheck, Overlap};
use trainable_tokens_format::{
    Adapter, AdapterConfig, Checkpoint, Merge, Overwrite, Result, SafetensorsFile, TokenIndices,
    split_adapter,
};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn f32_tensor(shape: [usize; 2], start: u8) -> (Dtype, Vec<usize>, Vec<u8>) {
    let values = (0u8..)
        .take(shape[0] * shape[1])
        .flat_map(|at| f32::from(start + at).to_le_bytes());
    (Dtype::F32, shape.to_vec(), values.collect())
}

type Tensors<'a> = BTreeMap<&'a str, (Dtype, Vec<usize>, Vec<u8>)>;

fn bytes_of(tensors: &Tensors<'_>) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A LoRA adapter that trains tokens of the embedding, and other tensors.
fn adapter(fields: &Value, tensors: &Tensors<'_>) -> Adapter {
    let mut config = AdapterConfig::lora(&TokenIndices::ByModule([].into())).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        config = config.with_field(name, value).unwrap();
    }
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", bytes_of(tensors)).unwrap();
    Adapter::from_parts(config, &file).unwrap()
}

fn merge(base: &Checkpoint, adapter: &Adapter, out: &Path) -> Result<()> {
    Merge::new(base)
        .with("grown", adapter)?
        .check(MergeCheck::Finite)
        .write(out, Overwrite::Refuse)?;
    Ok(())
}

/// An untied model of 3 tokens in two shards, the head first in the second.
fn sharded(dir: &Path) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    let config = json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false, "vocab_size": 3, "other": [1.50]});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let first = Tensors::from([
        (EMBEDDING, f32_tensor([3, 2], 0)),
        ("model.norm.weight", f32_tensor([1, 2], 50)),
    ]);
    let second = Tensors::from([
        (HEAD, f32_tensor([3, 2], 10)),
        ("model.layers.0.x.weight", f32_tensor([1, 2], 60)),
    ]);
    let map = json!({EMBEDDING: "a.safetensors", "model.norm.weight": "a.safetensors", HEAD: "b.safetensors",
        "model.layers.0.x.weight": "b.safetensors"});
    fs::write(dir.join("a.safetensors"), bytes_of(&first)).unwrap();
    fs::write(dir.join("b.safetensors"), bytes_of(&second)).unwrap();
    let index = json!({"metadata": {"total_size": 64, "total_parameters": 16}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// PEFT needs the base to be resized by hand before; the head of an untied model it does not even save (F14).
#[test]
fn f14_a_smaller_base_is_extended_by_the_merge() {
    let case = fixtures().join("resized_vocab_tied");
    let resized = Checkpoint::open(case.join("base_resized")).unwrap();
    let expected = SafetensorsFile::open(case.join("expected.safetensors")).unwrap();
    for name in ["adapter", "adapter_true"] {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("out");
        let base = Checkpoint::open(case.join("base")).unwrap();
        merge(&base, &Adapter::read(case.join(name)).unwrap(), &out).unwrap();
        let merged = Checkpoint::open(&out).unwrap();
        let table = merged.tensor(EMBEDDING).unwrap();
        assert_eq!(table.shape, [113, 32]);
        assert!(
            table.bytes == expected.tensor("merged.embed").unwrap().bytes,
            "{name}"
        );
        assert_eq!(
            merged.names().collect::<Vec<_>>(),
            base.names().collect::<Vec<_>>()
        );
        for other in base.names().filter(|name| *name != EMBEDDING) {
            assert!(
                merged.tensor(other).unwrap().bytes == base.tensor(other).unwrap().bytes,
                "{other}"
            );
        }
        // As transformers writes it for the resized model, byte for byte.
        let [ours, theirs] =
            [&merged, &resized].map(|model| fs::read_to_string(model.config_path()).unwrap());
        assert_eq!(ours, theirs);
    }
    // The rows alone do not tell that of token 111.
    let home = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(case.join("base")).unwrap();
    let refused = merge(
        &base,
        &Adapter::read(case.join("adapter_false")).unwrap(),
        &home.path().join("out"),
    );
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::TokenOutOfRange);
    assert!(tree(home.path()).is_empty());
}

#[test]
fn shards_index_and_config_grow_together() {
    let home = tempfile::tempdir().unwrap();
    let (dir, out) = (home.path().join("base"), home.path().join("out"));
    let base = sharded(&dir);
    let rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let table = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight";
    let head = "base_model.model.lm_head.weight";
    let mut tensors = Tensors::from([
        (rows, f32_tensor([2, 2], 100)),
        (table, f32_tensor([5, 2], 20)),
        (head, f32_tensor([5, 2], 30)),
    ]);
    let fields = json!({"trainable_token_indices": {"embed_tokens": [4, 1]}, "target_modules": ["none"]});
    merge(&base, &adapter(&fields, &tensors), &out).unwrap();
    let merged = Checkpoint::open(&out).unwrap();
    let values = |name: &str| merged.tensor(name).unwrap().to_rows().unwrap().to_f64_vec();
    assert_eq!(
        values(EMBEDDING),
        [20., 21., 102., 103., 24., 25., 26., 27., 100., 101.]
    );
    assert_eq!(values(HEAD), (30..40).map(f64::from).collect::<Vec<_>>());
    assert_eq!(values("model.norm.weight"), [50., 51.]);
    assert_eq!(values("model.layers.0.x.weight"), [60., 61.]);
    let config = read_json(&out.join("config.json"));
    assert_eq!(
        (&config["vocab_size"], &config["other"]),
        (&json!(5), &json!([1.50]))
    );
    let index = read_json(&out.join("model.safetensors.index.json"));
    assert_eq!(
        index["metadata"],
        json!({"total_size": 96, "total_parameters": 24})
    );
    assert_eq!(
        read_json(&dir.join("config.json"))["vocab_size"],
        3,
        "the base changed"
    );

    // A table that would be written with a value that is not finite, beyond the base's last row.
    let (.., bytes) = tensors.get_mut(table).unwrap();
    bytes[3 * 8..3 * 8 + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let refused = merge(&base, &adapter(&fields, &tensors), &home.path().join("no")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NonFinite);
    assert!(refused.to_string().contains("row 3, column 0"), "{refused}");
    // A head that is left behind.
    tensors.remove(head);
    tensors.insert(table, f32_tensor([5, 2], 20));
    let refused = merge(&base, &adapter(&fields, &tensors), &home.path().join("no")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Shape);
    assert!(refused.to_string().contains(HEAD), "{refused}");
    assert!(!home.path().join("no").exists());
}

/// LoRA's weights of a resized embedding come with the table that they are for.
#[test]
fn weights_of_lora_are_added_to_a_grown_table() {
    let home = tempfile::tempdir().unwrap();
    let base = sharded(&home.path().join("base"));
    let module = "base_model.model.model.embed_tokens";
    let [a, b, table] =
        ["lora_embedding_A", "lora_embedding_B", "base_layer.weight"].map(|leaf| format!("{module}.{leaf}"));
    let mut tensors = Tensors::from([
        (&*a, f32_tensor([1, 4], 1)),
        (&*b, f32_tensor([2, 1], 1)),
        (&*table, f32_tensor([4, 2], 20)),
    ]);
    let fields = json!({"r": 1, "lora_alpha": 2, "target_modules": ["embed_tokens"]});
    merge(&base, &adapter(&fields, &tensors), &home.path().join("out")).unwrap();
    let merged = Checkpoint::open(home.path().join("out")).unwrap();
    let rows = merged.tensor(EMBEDDING).unwrap().to_rows().unwrap();
    assert_eq!(rows.shape(), [4, 2]);
    assert_eq!(rows.to_f64_vec(), [22., 25., 26., 31., 30., 37., 34., 43.]);
    // A layer that is not over the vocabulary does not grow.
    tensors.insert(&table, f32_tensor([2, 2], 20));
    let refused = merge(&base, &adapter(&fields, &tensors), &home.path().join("no")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Shape);
    assert!(refused.to_string().contains(&table), "{refused}");
}

#[test]
fn a_grown_table_takes_the_rows_of_other_adapters() {
    let home = tempfile::tempdir().unwrap();
    let base = sharded(&home.path().join("base"));
    let rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let table = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight";
    let head = "base_model.model.lm_head.weight";
    let fields =
        |ids: [u32; 2]| json!({"trainable_token_indices": {"embed_tokens": ids}, "target_modules": ["none"]});
    let tensors = Tensors::from([
        (rows, f32_tensor([2, 2], 100)),
        (table, f32_tensor([5, 2], 20)),
        (head, f32_tensor([5, 2], 30)),
    ]);
    let grown = adapter(&fields([4, 1]), &tensors);
    let plain = adapter(&fields([1, 0]), &Tensors::from([(rows, f32_tensor([2, 2], 200))]));
    for (order, token_1) in [([&plain, &grown], [102., 103.]), ([&grown, &plain], [200., 201.])] {
        let merge = order
            .iter()
            .zip(["a", "b"])
            .try_fold(Merge::new(&base), |merge, (adapter, name)| {
                merge.with(name, adapter)
            });
        let merge = merge.unwrap().overlap(Overlap::LastWins);
        merge.write(home.path().join("out"), Overwrite::Replace).unwrap();
        let merged = Checkpoint::open(home.path().join("out")).unwrap();
        let values = merged.tensor(EMBEDDING).unwrap().to_rows().unwrap().to_f64_vec();
        let want = [[202., 203.], token_1, [24., 25.], [26., 27.], [100., 101.]].concat();
        assert_eq!(values, want);
    }
}

/// The whole tables go into the model with the rows, and LoRA's weights alone are left.
#[test]
fn a_grown_adapter_is_split() {
    let home = tempfile::tempdir().unwrap();
    let [dir, model, plain] = ["base", "model", "plain"].map(|name| home.path().join(name));
    let base = sharded(&dir);
    let tensors = Tensors::from([
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            f32_tensor([2, 2], 100),
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
            f32_tensor([5, 2], 20),
        ),
        ("base_model.model.lm_head.weight", f32_tensor([5, 2], 30)),
        (
            "base_model.model.model.layers.0.x.lora_A.weight",
            f32_tensor([1, 2], 1),
        ),
        (
            "base_model.model.model.layers.0.x.lora_B.weight",
            f32_tensor([1, 1], 3),
        ),
    ]);
    let fields = json!({
        "trainable_token_indices": {"embed_tokens": [4, 1]},
        "target_modules": ["x"],
        "r": 1,
        "lora_alpha": 1,
        "base_model_name_or_path": "somewhere",
    });
    let adapter = adapter(&fields, &tensors);
    let report = split_adapter(&base, &adapter, &model, &plain, Overwrite::Refuse).unwrap();
    assert_eq!((report.rows, report.lora_modules), (2, 0));
    let split = Checkpoint::open(&model).unwrap();
    let values = |name: &str| split.tensor(name).unwrap().to_rows().unwrap().to_f64_vec();
    assert_eq!(
        values(EMBEDDING),
        [20., 21., 102., 103., 24., 25., 26., 27., 100., 101.]
    );
    assert_eq!(values(HEAD), (30..40).map(f64::from).collect::<Vec<_>>());
    assert_eq!(values("model.layers.0.x.weight"), [60., 61.]);
    assert_eq!(read_json(&model.join("config.json"))["vocab_size"], 5);
    let rest = Adapter::read(&plain).unwrap();
    assert!(rest.modules().is_empty());
    assert!(rest.extra_tensors().all(|name| name.contains(".lora_")));
    let name = model.to_str().unwrap();
    assert_eq!(rest.config().base_model_name_or_path(), Some(name));
    assert_eq!(rest.config().field("r"), Some(json!(1)));
    let [whole, parts] = ["whole", "parts"].map(|name| home.path().join(name));
    merge(&base, &adapter, &whole).unwrap();
    merge(&split, &rest, &parts).unwrap();
    let [whole, parts] = [whole, parts].map(|dir| Checkpoint::open(dir).unwrap());
    for name in whole.names() {
        assert!(
            whole.tensor(name).unwrap().bytes == parts.tensor(name).unwrap().bytes,
            "{name}"
        );
    }
    assert_ne!(
        whole.tensor("model.layers.0.x.weight").unwrap().bytes,
        base.tensor("model.layers.0.x.weight").unwrap().bytes
    );
}

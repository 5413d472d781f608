//! Weights of LoRA: read, matched with a checkpoint, merged; and what is refused.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::{fixtures, tree};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use trainable_tokens_core::{
    BackendError as _, DType, EmbeddingSource as _, ErrorKind, MergeCheck, Overlap, TokenId,
};
use trainable_tokens_format::{
    Adapter, AdapterConfig, Checkpoint, Error, LoraLayer, Merge, MergeReport, Overwrite, Result,
    SafetensorsFile, TokenIndices,
};

const Q: &str = "layers.0.q_proj";

/// A tensor of a small file: name, shape, values.
type Matrix<'a> = (&'a str, [usize; 2], Vec<f64>);

/// Names and shapes of tensors.
type Shapes<'a> = Vec<(&'a str, [usize; 2])>;

fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let rows = trainable_tokens_core::TokenRows::new(values.to_vec(), 1, values.len()).unwrap();
    rows.to_dtype(dtype).to_le_bytes()
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

fn safetensors(dtype: DType, tensors: &[Matrix<'_>]) -> Vec<u8> {
    let encoded: Vec<_> = tensors.iter().map(|(.., values)| encode(dtype, values)).collect();
    let views = tensors.iter().zip(&encoded).map(|((name, shape, _), bytes)| {
        // A vector, where a matrix has no rows.
        let shape = if shape[0] == 0 {
            vec![shape[1]]
        } else {
            shape.to_vec()
        };
        (*name, TensorView::new(file_dtype(dtype), shape, bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn checkpoint(dir: &Path, dtype: DType, tensors: &[Matrix<'_>]) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("model.safetensors"), safetensors(dtype, tensors)).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn config(fields: &Value) -> Result<AdapterConfig> {
    let mut config = AdapterConfig::lora(&TokenIndices::ByModule([].into()))?;
    for (name, value) in fields.as_object().unwrap() {
        config = config.with_field(name, value)?;
    }
    Ok(config)
}

fn adapter_of(fields: &Value, dtype: DType, tensors: &[Matrix<'_>]) -> Result<Adapter> {
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", safetensors(dtype, tensors))?;
    Adapter::from_parts(config(fields)?, &file)
}

fn key(path: &str, factor: &str) -> String {
    format!("base_model.model.{path}.{factor}")
}

/// The factors of a linear layer of 3 inputs and 2 outputs, of rank 2; their product is [[7, 10, -3], [15, 22, -5]].
fn factors(path: &str) -> (String, String, [Vec<f64>; 2]) {
    let a = vec![1.0, 2.0, 1.0, 3.0, 4.0, -2.0];
    let b = vec![1.0, 2.0, 3.0, 4.0];
    (key(path, "lora_A.weight"), key(path, "lora_B.weight"), [a, b])
}

fn merge(base: &Checkpoint, adapters: &[&Adapter], out: &Path) -> Result<MergeReport> {
    let mut merge = Merge::new(base);
    for (number, adapter) in adapters.iter().enumerate() {
        merge = merge.with(format!("adapter {number}"), adapter)?;
    }
    merge.write(out, Overwrite::Replace)
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
    let table = checkpoint.table(name).unwrap();
    let ids: Vec<_> = (0u32..).take(table.vocab_size()).map(TokenId).collect();
    table.read_rows(&ids).unwrap().to_f64_vec()
}

/// Merges one adapter of the factors above into a weight of zeros, and returns it.
fn merged(fields: &Value, shape: [usize; 2]) -> Vec<f64> {
    let home = tempfile::tempdir().unwrap();
    let name = format!("{Q}.weight");
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &[(&name, shape, vec![0.0; 6])],
    );
    let (a, b, [a_values, b_values]) = factors(Q);
    let adapter = adapter_of(
        fields,
        DType::F32,
        &[(&a, [2, 3], a_values), (&b, [2, 2], b_values)],
    )
    .unwrap();
    let report = merge(&base, &[&adapter], &home.path().join("out")).unwrap();
    assert_eq!(
        (report.rows, report.lora_modules, report.tensors),
        (0, 1, vec![name.clone()])
    );
    values(&Checkpoint::open(home.path().join("out")).unwrap(), &name)
}

#[test]
fn fixtures_merge_as_in_peft() {
    for case in [
        "lora_list_untied",
        "lora_list_tied",
        "lora_dict_untied",
        "lora_dict_tied_same",
        "lora_list_gemma2",
    ] {
        let home = tempfile::tempdir().unwrap();
        let dir = fixtures().join(case);
        let base = Checkpoint::open(dir.join("base")).unwrap();
        let adapter = Adapter::read(dir.join("adapter")).unwrap();
        let report = merge(&base, &[&adapter], &home.path().join("out")).unwrap();
        assert_eq!(report.lora_modules, 4);
        let ours = Checkpoint::open(home.path().join("out")).unwrap();
        let theirs = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
        let mut compared = Vec::new();
        for name in base.names() {
            let path = name.strip_suffix(".weight").unwrap();
            let (before, after) = (base.tensor(name).unwrap(), ours.tensor(name).unwrap());
            assert_eq!(
                (before.dtype, before.shape),
                (after.dtype, after.shape),
                "{case}: {name}"
            );
            assert_eq!(
                before.bytes != after.bytes,
                report.tensors.iter().any(|changed| changed == name)
            );
            let Ok(expected) = theirs.tensor(&format!("merged.{path}")) else {
                continue;
            };
            compared.push(path);
            if adapter.rows(path).is_some() || before.bytes == after.bytes {
                assert!(after.bytes == expected.bytes, "{case}: {name}");
            } else {
                let [got, want] = [after, expected].map(|tensor| tensor.to_rows().unwrap().to_f64_vec());
                let furthest = got
                    .iter()
                    .zip(&want)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f64::max);
                assert!(furthest <= 1e-6, "{case}: {name}: {furthest}");
            }
        }
        assert!(
            compared.iter().any(|path| path.ends_with("q_proj")),
            "{case}: {compared:?}"
        );
        assert!(compared.contains(&"model.embed_tokens"), "{case}");
    }
}

/// PEFT merges different tokens of both tied modules into their one table, which changes its logits by 1.57.
#[test]
fn f8_tied_modules_of_different_tokens_are_not_merged() {
    let home = tempfile::tempdir().unwrap();
    let dir = fixtures().join("lora_dict_tied_different");
    let base = Checkpoint::open(dir.join("base")).unwrap();
    let adapter = Adapter::read(dir.join("adapter")).unwrap();
    let refused = merge(&base, &[&adapter], &home.path().join("out"));
    assert!(matches!(refused, Err(Error::TiedTokens { .. })), "{refused:?}");
    assert!(tree(home.path()).is_empty());
}

#[test]
fn weights_tell_their_settings() {
    let (a, b, [a_values, b_values]) = factors(Q);
    let fields = json!({"r": 9, "lora_alpha": 3, "rank_pattern": {r"layers\.\d+\.q_proj": 2}, "use_rslora": true,
        "alpha_pattern": {"q_proj": 0.5, "v_proj": 7}});
    let adapter = adapter_of(
        &fields,
        DType::BF16,
        &[(&a, [2, 3], a_values), (&b, [2, 2], b_values)],
    )
    .unwrap();
    let weights = adapter.lora_weights().unwrap();
    assert_eq!(weights.len(), 1);
    let lora = &weights[0];
    assert_eq!(
        (lora.path(), lora.layer(), lora.rank()),
        (Q, LoraLayer::Linear, 2)
    );
    assert_eq!((lora.in_features(), lora.out_features()), (3, 2));
    assert_eq!(lora.scaling(), 0.5 / 2f64.sqrt());
    assert_eq!(lora.dtypes(), [DType::BF16; 2]);
    assert_eq!(lora.tensors().collect::<Vec<_>>(), [a, b]);
    assert_eq!(lora.first_non_finite(), None);

    let tokens = Adapter::read(fixtures().join("llama_tied/adapter")).unwrap();
    assert!(tokens.lora_weights().unwrap().is_empty());
}

#[test]
fn the_scaled_product_is_added() {
    let product = [7f32, 10.0, -3.0, 15.0, 22.0, -5.0];
    for (fields, scaling) in [
        (json!({"r": 2, "lora_alpha": 2}), 1.0),
        (json!({"r": 2, "lora_alpha": 1}), 0.5),
        (json!({"r": 2, "lora_alpha": -4.5}), -2.25),
        (
            json!({"r": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}),
            2.0,
        ),
        (
            json!({"r": 2, "lora_alpha": 4, "alpha_pattern": {"k_proj": 6}}),
            2.0,
        ),
        // Settings that do not change the weights.
        (
            json!({"r": 2, "lora_alpha": 2, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
            1.0,
        ),
        (
            json!({"r": 2, "lora_alpha": 2, "init_lora_weights": false, "lora_dropout": 0.5, "bias": "all"}),
            1.0,
        ),
        (
            json!({"r": 2, "lora_alpha": 2, "velora_config": {"rank": 1}, "target_parameters": []}),
            1.0,
        ),
    ] {
        let want = product.map(|value| f64::from(value) * scaling);
        assert_eq!(merged(&fields, [2, 3]), want, "{fields}");
    }
    let roots = merged(&json!({"r": 2, "lora_alpha": 3, "use_rslora": true}), [2, 3]);
    // 3 / sqrt(2), rounded once.
    let want = product.map(|value| f64::from(value * 2.121_320_2_f32));
    assert_eq!(roots, want);
}

/// A weight that is not square tells by its shape how it lies, whatever the config says: PEFT, too, goes by the layer.
#[test]
fn weights_stored_by_inputs_are_transposed() {
    let plain = json!({"r": 2, "lora_alpha": 2});
    let transposed = json!({"r": 2, "lora_alpha": 2, "fan_in_fan_out": true});
    for fields in [&plain, &transposed] {
        assert_eq!(merged(fields, [2, 3]), [7.0, 10.0, -3.0, 15.0, 22.0, -5.0]);
        assert_eq!(merged(fields, [3, 2]), [7.0, 15.0, 10.0, 22.0, -3.0, -5.0]);
    }
}

#[test]
fn a_square_weight_lies_like_its_neighbours() {
    let product = [10.0, 13.0, 22.0, 29.0];
    let turned = [10.0, 22.0, 13.0, 29.0];
    // What else there is: another weight of the block, with the bias that tells how it lies, or one farther away.
    let neighbour = |shape, bias: usize| {
        vec![
            ("h.0.attn.c_attn.weight", shape, vec![0.0; 6]),
            ("h.0.attn.c_attn.bias", [0, bias], vec![0.0; bias]),
        ]
    };
    let elsewhere = vec![
        ("lm_head.weight", [3, 2], vec![0.0; 6]),
        ("lm_head.bias", [0, 3], vec![0.0; 3]),
    ];
    for (others, fan_in_fan_out, want) in [
        (Vec::new(), false, product),
        (Vec::new(), true, turned),
        (neighbour([2, 3], 3), false, turned),
        (neighbour([2, 3], 3), true, turned),
        (neighbour([3, 2], 3), true, product),
        (elsewhere, true, turned),
    ] {
        let home = tempfile::tempdir().unwrap();
        let path = "h.0.attn.c_proj";
        let name = format!("{path}.weight");
        let mut tensors: Vec<Matrix<'_>> = others;
        tensors.push((&name, [2, 2], vec![0.0; 4]));
        let base = checkpoint(&home.path().join("base"), DType::F32, &tensors);
        let (a, b) = (key(path, "lora_A.weight"), key(path, "lora_B.weight"));
        let fields = json!({"r": 2, "lora_alpha": 2, "fan_in_fan_out": fan_in_fan_out});
        let factor = |values: [f64; 4]| values.to_vec();
        let adapter = adapter_of(
            &fields,
            DType::F32,
            &[
                (&a, [2, 2], factor([2.0, 3.0, 4.0, 5.0])),
                (&b, [2, 2], factor([1.0, 2.0, 3.0, 4.0])),
            ],
        )
        .unwrap();
        merge(&base, &[&adapter], &home.path().join("out")).unwrap();
        assert_eq!(
            values(&Checkpoint::open(home.path().join("out")).unwrap(), &name),
            want,
            "{fan_in_fan_out}"
        );
    }
}

/// A delta of 2^-9 + 2^-10 on a weight of 1: in BF16 (steps of 2^-7 above 1) the sum alone rounds to 1, and so does the
/// delta that is rounded before. With 2^-8 + 2^-17 they differ: the sum rounds up, the rounded delta is a tie.
#[test]
fn sums_are_rounded_as_peft_rounds_them() {
    let step = 2f64.powi(-7);
    let delta = 2f64.powi(-8) + 2f64.powi(-17);
    for (embedding, want) in [(false, 1.0 + step), (true, 1.0)] {
        for stored in [DType::F32, DType::F64] {
            let home = tempfile::tempdir().unwrap();
            let base = checkpoint(
                &home.path().join("base"),
                DType::BF16,
                &[("emb.weight", [1, 1], vec![1.0])],
            );
            let names = if embedding {
                ["lora_embedding_A", "lora_embedding_B"]
            } else {
                ["lora_A.weight", "lora_B.weight"]
            };
            let [a, b] = names.map(|factor| key("emb", factor));
            let fields = json!({"r": 1, "lora_alpha": 1});
            let adapter = adapter_of(
                &fields,
                stored,
                &[(&a, [1, 1], vec![delta]), (&b, [1, 1], vec![1.0])],
            )
            .unwrap();
            merge(&base, &[&adapter], &home.path().join("out")).unwrap();
            let merged = values(&Checkpoint::open(home.path().join("out")).unwrap(), "emb.weight");
            assert_eq!(merged, [want], "{embedding}");
        }
    }
}

#[test]
fn sums_in_double_keep_what_single_would_lose() {
    let home = tempfile::tempdir().unwrap();
    let base = checkpoint(
        &home.path().join("base"),
        DType::F64,
        &[("l.weight", [1, 1], vec![1.0])],
    );
    let tiny = 2f64.powi(-40);
    let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|factor| key("l", factor));
    let fields = json!({"r": 1, "lora_alpha": 1});
    let adapter = adapter_of(
        &fields,
        DType::F32,
        &[(&a, [1, 1], vec![tiny]), (&b, [1, 1], vec![1.0])],
    )
    .unwrap();
    merge(&base, &[&adapter], &home.path().join("out")).unwrap();
    let merged = values(&Checkpoint::open(home.path().join("out")).unwrap(), "l.weight");
    assert_eq!(merged, [1.0 + tiny]);
}

/// An embedding of more rows than a block holds, with rows of tokens from another adapter on top.
#[test]
fn embeddings_add_the_transpose_and_rows_of_tokens_win() {
    let (vocab, dim) = (3000usize, 100usize);
    let home = tempfile::tempdir().unwrap();
    let table: Vec<f64> = (0..vocab * dim)
        .map(|at| f64::from(u32::try_from(at % 17).unwrap()))
        .collect();
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &[("emb.weight", [vocab, dim], table.clone())],
    );
    let [a, b] = ["lora_embedding_A", "lora_embedding_B"].map(|factor| key("emb", factor));
    let a_values: Vec<f64> = (0..2 * vocab)
        .map(|at| f64::from(u32::try_from(at % 5).unwrap()) - 2.0)
        .collect();
    let b_values: Vec<f64> = (0..2 * dim)
        .map(|at| f64::from(u32::try_from(at % 7).unwrap()) - 3.0)
        .collect();
    let fields = json!({"r": 2, "lora_alpha": 1});
    let lora = adapter_of(
        &fields,
        DType::F16,
        &[
            (&a, [2, vocab], a_values.clone()),
            (&b, [dim, 2], b_values.clone()),
        ],
    )
    .unwrap();
    let tokens = json!({"target_modules": null, "trainable_token_indices": {"emb": [2999, 0]}});
    let rows = key("emb", "token_adapter.trainable_tokens_delta");
    let tokens = adapter_of(&tokens, DType::F32, &[(&rows, [2, dim], vec![0.125; 2 * dim])]).unwrap();
    let want: Vec<f64> = (0..vocab * dim)
        .map(|at| {
            let (row, column) = (at / dim, at % dim);
            let product =
                b_values[2 * column] * a_values[row] + b_values[2 * column + 1] * a_values[vocab + row];
            if row == 0 || row == 2999 {
                0.125
            } else {
                table[at] + 0.5 * product
            }
        })
        .collect();
    for order in [[&lora, &tokens], [&tokens, &lora]] {
        let report = merge(&base, &order, &home.path().join("out")).unwrap();
        assert_eq!((report.rows, report.lora_modules), (2, 1));
        assert!(values(&Checkpoint::open(home.path().join("out")).unwrap(), "emb.weight") == want);
    }
}

/// PEFT saves the weight below LoRA of an embedding that it targets, and loads it over the base's.
#[test]
fn a_weight_that_comes_with_the_adapter_replaces_the_bases() {
    let home = tempfile::tempdir().unwrap();
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &[("emb.weight", [2, 1], vec![1.0, 2.0])],
    );
    let [a, b] = ["lora_embedding_A", "lora_embedding_B"].map(|factor| key("emb", factor));
    let stored = key("emb", "base_layer.weight");
    let fields = json!({"r": 1, "lora_alpha": 1});
    let make = |shape, weight: Vec<f64>| {
        let factors = [(&*a, [1, 2], vec![0.5, 0.25]), (&*b, [1, 1], vec![1.0])];
        let all: Vec<Matrix<'_>> = factors.into_iter().chain([(&*stored, shape, weight)]).collect();
        adapter_of(&fields, DType::F32, &all).unwrap()
    };
    let adapter = make([2, 1], vec![10.0, 20.0]);
    merge(&base, &[&adapter], &home.path().join("out")).unwrap();
    assert_eq!(
        values(&Checkpoint::open(home.path().join("out")).unwrap(), "emb.weight"),
        [10.5, 20.25]
    );
    let error = merge(&base, &[&make([3, 1], vec![0.0; 3])], &home.path().join("no")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
    assert!(error.to_string().contains(&stored), "{error}");
}

#[test]
fn several_adapters_add_up_in_their_order() {
    let home = tempfile::tempdir().unwrap();
    let name = format!("{Q}.weight");
    let base = checkpoint(
        &home.path().join("base"),
        DType::BF16,
        &[(&name, [1, 1], vec![1.0])],
    );
    let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|factor| key(Q, factor));
    let adapter = |delta: f64| {
        let fields = json!({"r": 1, "lora_alpha": 1});
        adapter_of(
            &fields,
            DType::F32,
            &[(&a, [1, 1], vec![delta]), (&b, [1, 1], vec![1.0])],
        )
        .unwrap()
    };
    // 256 and half a step of its BF16: lost if added to 256, but not if added to 1 before.
    let (large, small) = (adapter(256.0), adapter(1.0));
    for (order, want) in [([&large, &small], 256.0), ([&small, &large], 258.0)] {
        merge(&base, &order, &home.path().join("out")).unwrap();
        assert_eq!(
            values(&Checkpoint::open(home.path().join("out")).unwrap(), &name),
            [want]
        );
    }
    let twice = Merge::new(&base)
        .with("one", &large)
        .unwrap()
        .with("one", &small)
        .unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Adapter);
    assert!(twice.to_string().contains("\"one\""), "{twice}");
}

#[test]
fn fields_that_change_the_weights_are_refused_by_name() {
    let (a, b, [a_values, b_values]) = factors(Q);
    let tensors = [(&*a, [2, 3], a_values), (&*b, [2, 2], b_values)];
    for (field, value, kind) in [
        ("use_dora", json!(true), ErrorKind::Unsupported),
        ("use_qalora", json!(true), ErrorKind::Unsupported),
        ("lora_bias", json!(true), ErrorKind::Unsupported),
        (
            "use_bdlora",
            json!({"target_modules_bd_a": []}),
            ErrorKind::Unsupported,
        ),
        ("arrow_config", json!({"top_k": 3}), ErrorKind::Unsupported),
        ("kasa_config", json!({"beta": 1e-4}), ErrorKind::Unsupported),
        (
            "monteclora_config",
            json!({"num_samples": 8}),
            ErrorKind::Unsupported,
        ),
        ("alora_invocation_tokens", json!([1, 2]), ErrorKind::Unsupported),
        (
            "layer_replication",
            json!([[0, 4], [2, 5]]),
            ErrorKind::Unsupported,
        ),
        ("megatron_config", json!({"a": 1}), ErrorKind::Unsupported),
        (
            "target_parameters",
            json!(["experts.gate_up_proj"]),
            ErrorKind::Unsupported,
        ),
        ("init_lora_weights", json!("pissa"), ErrorKind::Unsupported),
        (
            "init_lora_weights",
            json!("pissa_niter_16"),
            ErrorKind::Unsupported,
        ),
        ("init_lora_weights", json!("olora"), ErrorKind::Unsupported),
        ("init_lora_weights", json!("corda"), ErrorKind::Unsupported),
        ("init_lora_weights", json!("loftq"), ErrorKind::Unsupported),
        ("init_lora_weights", json!("lora_ga"), ErrorKind::Unsupported),
        ("init_lora_weights", json!(1), ErrorKind::File),
        ("r", json!(0), ErrorKind::File),
        ("r", json!(2.0), ErrorKind::File),
        ("r", json!(null), ErrorKind::File),
        ("lora_alpha", json!("8"), ErrorKind::File),
        ("lora_alpha", json!(null), ErrorKind::File),
        ("use_rslora", json!(1), ErrorKind::File),
        ("fan_in_fan_out", json!("no"), ErrorKind::File),
        ("rank_pattern", json!([2]), ErrorKind::File),
        ("rank_pattern", json!({"q_proj": 0}), ErrorKind::File),
        ("rank_pattern", json!({"(q": 2}), ErrorKind::File),
        ("alpha_pattern", json!({"q_proj": "2"}), ErrorKind::File),
        ("exclude_modules", json!(["q_proj"]), ErrorKind::File),
        ("target_modules", json!(["v_proj"]), ErrorKind::File),
    ] {
        let mut fields = json!({"r": 2, "lora_alpha": 2});
        fields[field] = value.clone();
        let refused = adapter_of(&fields, DType::F32, &tensors)
            .unwrap()
            .lora_weights()
            .unwrap_err();
        assert_eq!(refused.kind(), kind, "{field}: {value}: {refused}");
        let name = if field == "exclude_modules" {
            "target_modules"
        } else {
            field
        };
        let message = refused.to_string();
        assert!(
            message.contains("adapter_config.json") && message.contains(name),
            "{field}: {message}"
        );
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn tensors_that_are_not_plain_lora_are_refused_by_name() {
    let (a, b, [a_values, b_values]) = factors(Q);
    let plain = [(&*a, [2, 3], a_values), (&*b, [2, 2], b_values)];
    let fields = json!({"r": 2});
    for (leaf, says) in [
        ("layers.0.q_proj.lora_magnitude_vector", "DoRA"),
        ("layers.0.q_proj.lora_B.bias", "biases of LoRA"),
        ("layers.0.q_proj.lora_A.default.weight", "not one of the weights"),
        ("layers.0.q_proj.lora_diag", "not one of the weights"),
        ("layers.0.q_proj.base_layer.bias", "bias"),
        ("lm_head.weight", "modules_to_save"),
        ("lm_head.base_layer.weight", "modules_to_save"),
        ("x", "neither rows of tokens nor weights of LoRA"),
    ] {
        let name = key(leaf, "").trim_end_matches('.').to_owned();
        let all: Vec<Matrix<'_>> = plain
            .iter()
            .cloned()
            .chain([(&*name, [1, 2], vec![0.0; 2])])
            .collect();
        let refused = adapter_of(&fields, DType::F32, &all)
            .unwrap()
            .lora_weights()
            .unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{name}: {refused}");
        let message = refused.to_string();
        assert!(
            message.contains(&name) && message.contains(says),
            "{name}: {message}"
        );
    }
}

#[test]
fn factors_have_the_ranks_of_the_config_and_come_in_pairs() {
    let (a, b, [a_values, b_values]) = factors(Q);
    let embedding = key(Q, "lora_embedding_A");
    let a_of = |shape| (&*a, shape, a_values.clone());
    let b_of = |shape| (&*b, shape, b_values.clone());
    let cases: [(Vec<Matrix<'_>>, &str, ErrorKind); 6] = [
        (vec![a_of([2, 3])], &b, ErrorKind::File),
        (vec![b_of([2, 2])], &a, ErrorKind::File),
        (
            vec![a_of([3, 2]), b_of([2, 2])],
            "[r, in] with r = 2",
            ErrorKind::Shape,
        ),
        (
            vec![a_of([2, 3]), b_of([4, 1])],
            "[out, r] with r = 2",
            ErrorKind::Shape,
        ),
        (vec![a_of([2, 3]), b_of([0, 4])], &b, ErrorKind::Shape),
        (
            vec![a_of([2, 3]), b_of([2, 2]), (&embedding, [2, 3], a_values.clone())],
            &embedding,
            ErrorKind::Unsupported,
        ),
    ];
    for (tensors, says, kind) in cases {
        let refused = adapter_of(&json!({"r": 2}), DType::F32, &tensors)
            .unwrap()
            .lora_weights()
            .unwrap_err();
        assert_eq!(refused.kind(), kind, "{refused}");
        assert!(refused.to_string().contains(says), "{says}: {refused}");
    }
    let integers = [(
        a.clone(),
        TensorView::new(Dtype::I32, vec![2, 3], &[0; 24]).unwrap(),
    )];
    let bytes = safetensors::serialize(integers, None).unwrap();
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", bytes).unwrap();
    let adapter = Adapter::from_parts(config(&json!({})).unwrap(), &file).unwrap();
    assert_eq!(adapter.lora_weights().unwrap_err().kind(), ErrorKind::DType);
}

#[test]
fn a_base_that_does_not_fit_is_refused_by_name() {
    let (a, b, [a_values, b_values]) = factors(Q);
    let tensors = [(&*a, [2, 3], a_values), (&*b, [2, 2], b_values)];
    let weight = format!("{Q}.weight");
    let quantised = format!("{Q}.qweight");
    let v = "layers.0.v_proj.weight";
    let zeros = |shape: [usize; 2]| vec![0.0; shape[0] * shape[1]];
    let q_only = json!({"r": 2, "target_modules": ["q_proj"]});
    let both = json!({"r": 2, "target_modules": ["q_proj", "v_proj"]});
    let saved = json!({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["v_proj"]});
    let cases: [(&Value, Shapes<'_>, &str, ErrorKind); 6] = [
        (&q_only, vec![(v, [2, 3])], &weight, ErrorKind::File),
        (&q_only, vec![(&quantised, [2, 3])], "quantised", ErrorKind::File),
        (
            &q_only,
            vec![(&weight, [2, 4])],
            "3 inputs and 2 outputs",
            ErrorKind::Shape,
        ),
        (&q_only, vec![(&weight, [0, 6])], &weight, ErrorKind::Shape),
        (
            &both,
            vec![(&weight, [2, 3]), (v, [2, 3])],
            "layers.0.v_proj.lora_A.weight",
            ErrorKind::File,
        ),
        (&saved, vec![(&weight, [2, 3]), (v, [2, 3])], v, ErrorKind::File),
    ];
    for (fields, base, says, kind) in cases {
        let home = tempfile::tempdir().unwrap();
        let base: Vec<Matrix<'_>> = base
            .into_iter()
            .map(|(name, shape)| (name, shape, zeros([shape[0].max(1), shape[1]])))
            .collect();
        let base = checkpoint(&home.path().join("base"), DType::F32, &base);
        let adapter = adapter_of(fields, DType::F32, &tensors).unwrap();
        let out = home.path().join("out");
        let refused = merge(&base, &[&adapter], &out).unwrap_err();
        assert_eq!(refused.kind(), kind, "{refused}");
        assert!(refused.to_string().contains(says), "{says}: {refused}");
        assert!(!out.exists());
    }
    // Weights of other models are none of its business, nor is a vector.
    let home = tempfile::tempdir().unwrap();
    let base = [(&*weight, [2, 3], zeros([2, 3])), (v, [0, 3], vec![0.0; 3])];
    let base = checkpoint(&home.path().join("base"), DType::F32, &base);
    let adapter = adapter_of(&both, DType::F32, &tensors).unwrap();
    merge(&base, &[&adapter], &home.path().join("out")).unwrap();
    // An adapter of nothing.
    let empty = adapter_of(&q_only, DType::F32, &[]).unwrap();
    let refused = merge(&base, &[&empty], &home.path().join("no")).unwrap_err();
    assert!(matches!(refused, Error::TensorMissing { .. }), "{refused}");
}

/// In PEFT the two cannot be on one module either.
/// Checkpoints of BERT hold parts that a masked language model does not have, and PEFT's `dense` does not find there.
#[test]
fn a_pooler_may_have_no_weights() {
    let home = tempfile::tempdir().unwrap();
    let (dense, pooler) = ("bert.encoder.layer.0.output.dense", "bert.pooler.dense");
    let names = [dense, pooler].map(|path| format!("{path}.weight"));
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &names.each_ref().map(|name| (name.as_str(), [2, 3], vec![0.0; 6])),
    );
    let adapter = |path: &str| {
        let (a, b, [a_values, b_values]) = factors(path);
        let tensors = [(a.as_str(), [2, 3], a_values), (b.as_str(), [2, 2], b_values)];
        adapter_of(
            &json!({"r": 2, "target_modules": ["dense"]}),
            DType::F32,
            &tensors,
        )
        .unwrap()
    };
    let out = home.path().join("out");
    let report = merge(&base, &[&adapter(dense)], &out).unwrap();
    assert_eq!(report.tensors, [names[0].clone()]);
    let error = merge(&base, &[&adapter(pooler)], &out).unwrap_err().to_string();
    assert!(
        error.contains(dense) && error.contains("exclude_modules"),
        "{error}"
    );
}

#[test]
fn rows_and_weights_of_one_module_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &[("emb.weight", [2, 1], vec![1.0, 2.0])],
    );
    let [a, b, rows] = [
        "lora_embedding_A",
        "lora_embedding_B",
        "token_adapter.trainable_tokens_delta",
    ]
    .map(|leaf| key("emb", leaf));
    let fields = json!({"r": 1, "trainable_token_indices": {"emb": [1]}});
    let tensors = [
        (&*a, [1, 2], vec![0.0; 2]),
        (&*b, [1, 1], vec![0.0]),
        (&*rows, [1, 1], vec![0.0]),
    ];
    let adapter = adapter_of(&fields, DType::F32, &tensors).unwrap();
    let refused = merge(&base, &[&adapter], &home.path().join("out")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("\"emb\""), "{refused}");
}

/// PEFT's `safe_merge` looks at the whole matrix and blames the adapter for whatever the base holds.
#[test]
fn f13_only_what_an_adapter_breaks_is_held_against_it() {
    let home = tempfile::tempdir().unwrap();
    let name = format!("{Q}.weight");
    let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|factor| key(Q, factor));
    let fields = json!({"r": 1, "lora_alpha": 1});
    let adapter = |last: f64| {
        adapter_of(
            &fields,
            DType::F32,
            &[(&a, [1, 2], vec![0.5, last]), (&b, [2, 1], vec![0.0, 1.0])],
        )
        .unwrap()
    };
    let with_nan = vec![f64::NAN, 1.0, 2.0, 3.0];
    let base = checkpoint(
        &home.path().join("base"),
        DType::F16,
        &[
            (&name, [2, 2], with_nan),
            ("emb.weight", [2, 1], vec![f64::NAN, 0.0]),
        ],
    );
    let out = home.path().join("out");
    let check = |adapter: &Adapter| {
        let merge = Merge::new(&base)
            .with("mine", adapter)
            .unwrap()
            .check(MergeCheck::Finite);
        merge.write(&out, Overwrite::Refuse)
    };
    // Finite in the file, but not in F16.
    for last in [f64::NAN, f64::INFINITY, 1e6] {
        let refused = check(&adapter(last)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NonFinite);
        let message = refused.to_string();
        for part in ["mine", &name, "row 1, column 1", "F16"] {
            // A NaN of the adapter also spoils the row of zeros.
            let first = if last == 1e6 {
                "row 1, column 1"
            } else {
                "row 0, column 1"
            };
            let part = if part.starts_with("row") { first } else { part };
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(!out.exists());
        Merge::new(&base)
            .with("mine", &adapter(last))
            .unwrap()
            .write(home.path().join("unchecked"), Overwrite::Replace)
            .unwrap();
    }
    check(&adapter(0.5)).unwrap();

    let rows = |value: f64| {
        let rows = key("emb", "token_adapter.trainable_tokens_delta");
        let fields = json!({"trainable_token_indices": {"emb": [1]}});
        adapter_of(&fields, DType::F32, &[(&rows, [1, 1], vec![value])]).unwrap()
    };
    let both = |value: f64| {
        let merge = Merge::new(&base)
            .with("first", &adapter(0.5))
            .unwrap()
            .with("second", &rows(value))
            .unwrap();
        merge
            .check(MergeCheck::Finite)
            .write(home.path().join("both"), Overwrite::Refuse)
    };
    let message = both(1e6).unwrap_err().to_string();
    assert!(
        message.contains("second") && message.contains("emb.weight") && message.contains("token id 1"),
        "{message}"
    );
    assert!(!message.contains("first"), "{message}");
    both(1e3).unwrap();
}

#[test]
fn tokens_of_several_adapters_count_as_asked() {
    let home = tempfile::tempdir().unwrap();
    let base = checkpoint(
        &home.path().join("base"),
        DType::F32,
        &[
            ("emb.weight", [4, 1], vec![0.0; 4]),
            ("head.weight", [4, 1], vec![0.0; 4]),
        ],
    );
    let rows = |module: &str, ids: [u32; 2], values: [f64; 2]| {
        let rows = key(module, "token_adapter.trainable_tokens_delta");
        let fields = json!({"trainable_token_indices": {module: ids}});
        adapter_of(&fields, DType::F32, &[(&rows, [2, 1], values.to_vec())]).unwrap()
    };
    let adapters = [
        rows("emb", [3, 0], [1.0, 2.0]),
        rows("head", [0, 1], [5.0, 6.0]),
        rows("emb", [1, 3], [3.0, 4.0]),
    ];
    let merge = |overlap: Overlap| {
        let merge = adapters
            .iter()
            .zip(["a", "b", "c"])
            .try_fold(Merge::new(&base), |merge, (adapter, name)| {
                merge.with(name, adapter)
            });
        merge
            .unwrap()
            .overlap(overlap)
            .write(home.path().join("out"), Overwrite::Replace)?;
        let merged = Checkpoint::open(home.path().join("out")).unwrap();
        assert_eq!(values(&merged, "head.weight"), [5.0, 6.0, 0.0, 0.0]);
        Ok::<_, Error>(values(&merged, "emb.weight"))
    };
    let refused = merge(Overlap::Refuse).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Overlap);
    let message = refused.to_string();
    assert!(
        message.contains("token id 3") && message.contains("\"a\"") && message.contains("\"c\""),
        "{message}"
    );
    assert_eq!(merge(Overlap::LastWins).unwrap(), [2.0, 3.0, 0.0, 4.0]);
    assert_eq!(
        merge(Overlap::WeightedMean(vec![3.0, 100.0, 1.0])).unwrap(),
        [2.0, 3.0, 0.0, 1.75]
    );
    for weights in [vec![1.0, 1.0], vec![1.0; 4]] {
        assert_eq!(
            merge(Overlap::WeightedMean(weights)).unwrap_err().kind(),
            ErrorKind::Shape
        );
    }
    assert_eq!(
        merge(Overlap::WeightedMean(vec![1.0, 1.0, -1.0]))
            .unwrap_err()
            .kind(),
        ErrorKind::Hyperparameter
    );
}

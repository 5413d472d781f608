//! Lookup, head and training: F2 to F4, F6 and F7.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use ndarray::Array2;
use trainable_tokens::format::SafetensorsFile;
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{
    Adam, AdamConfig, DType, DecayTowardOriginal, Element, EmbedScale, Error, LayerOptions, Padding,
    PaddingRule, TokenId, TokenRows, TokenSet,
};

/// The directory of PEFT's cases.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

/// The tensors of a case's `expected.safetensors`: floats as rows, ids as rows of `f64`; leading dimensions flattened.
pub(crate) fn case(name: &str) -> BTreeMap<String, TokenRows> {
    let file = SafetensorsFile::open(fixtures().join(name).join("expected.safetensors")).unwrap();
    let tensors = file.names().map(|name| {
        let tensor = file.tensor(name).unwrap();
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let count: usize = tensor.shape.iter().product();
        let rows = count.checked_div(columns).unwrap_or(0);
        let rows = if let Ok(dtype) = tensor.float_dtype() {
            TokenRows::from_le_bytes(dtype, rows, columns, tensor.bytes).unwrap()
        } else {
            let values = tensor.bytes.chunks_exact(tensor.bytes.len() / count);
            let value = |bytes: &[u8]| {
                let mut wide = [0; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(wide) as f64
            };
            TokenRows::new::<f64>(values.map(value).collect(), rows, columns).unwrap()
        };
        (name.to_owned(), rows)
    });
    tensors.collect()
}

pub(crate) fn ids(rows: &TokenRows) -> Vec<u32> {
    let ids = rows.to_f64_vec().into_iter();
    ids.map(|id| format!("{id}").parse().unwrap()).collect()
}

pub(crate) fn table<T: Element>(rows: &TokenRows) -> Array2<T> {
    Array2::from_shape_vec(rows.shape(), rows.as_slice::<T>().unwrap().to_vec()).unwrap()
}

pub(crate) fn bits<T: Element>(values: &Array2<T>) -> Vec<u8> {
    let mut out = Vec::new();
    values.iter().for_each(|value| value.extend_le_bytes(&mut out));
    out
}

/// PEFT computes a tied output layer without its bias: BERT's logits are off by it (0.292 at most in the case), though
/// nothing was trained. Here the head keeps its bias, and untrained rows change no bit.
#[cfg(feature = "candle")]
#[test]
fn f02_a_tied_head_keeps_its_bias() {
    use candle_core::{Device, Module, Tensor};
    let base = SafetensorsFile::open(fixtures().join("bert_mlm/base/model.safetensors")).unwrap();
    let read = |name: &str| {
        let tensor = base.tensor(name).unwrap();
        let values: Vec<f32> = tensor
            .bytes
            .chunks_exact(4)
            .map(<f32 as Element>::from_le_bytes)
            .collect();
        Tensor::from_vec(values, tensor.shape, &Device::Cpu).unwrap()
    };
    let (table, bias) = (
        read("bert.embeddings.word_embeddings.weight"),
        read("cls.predictions.bias"),
    );
    let hidden = table.narrow(0, 3, 5).unwrap();
    let frozen = trainable_tokens::candle::FrozenLinear::new(table.clone(), Some(bias.clone())).unwrap();
    let layer = trainable_tokens::candle::TrainableTokens::from_tensor(table, &[0, 219, 33, 104]).unwrap();
    let head = layer.tied_head().with_bias(&bias).unwrap();
    let [ours, frozen] = [head.logits(&hidden).unwrap(), frozen.forward(&hidden).unwrap()]
        .map(|logits| logits.to_vec2::<f32>().unwrap());
    assert_eq!(ours, frozen);

    let expected = case("bert_mlm");
    let off = |name: &str| {
        let pairs = expected[name]
            .to_f64_vec()
            .into_iter()
            .zip(expected["logits.base"].to_f64_vec());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(
        (off("logits.noop") - 0.292).abs() < 1e-3,
        "PEFT was off by {}",
        off("logits.noop")
    );
}

/// PEFT bypasses the embedding's own forward: over a bf16 table it rounds BART's scale, 4.8989795 to 4.90625, where BART
/// multiplies by the float, and up to 0.0078 of an untrained embedding is off. Here both rules exist, and either is a no-op.
#[test]
fn f03_the_base_models_own_scale_counts() {
    let expected = case("bart_tied");
    let base = SafetensorsFile::open(fixtures().join("bart_tied/base/model.safetensors")).unwrap();
    let weight = base
        .tensor("model.shared.weight")
        .unwrap()
        .to_rows()
        .unwrap()
        .to_dtype(DType::BF16);
    let ids = ids(&expected["probe.input_ids"]);
    let lookup = |scale| {
        let table = NdTable::new(table::<bf16>(&weight)).unwrap();
        let layer: TrainableTokens<_, bf16> =
            TrainableTokens::new(table, TokenSet::new([149, 8, 55], 150).unwrap()).unwrap();
        let scale = Some(scale);
        bits(
            &layer
                .with_options(LayerOptions {
                    scale,
                    ..LayerOptions::default()
                })
                .lookup(&ids)
                .unwrap(),
        )
    };
    let scale = 24f64.sqrt();
    assert_eq!(
        lookup(EmbedScale::Exact(scale)),
        expected["embed.base_bf16"].to_dtype(DType::BF16).to_le_bytes()
    );
    assert_eq!(
        lookup(EmbedScale::TableDType(scale)),
        expected["embed.noop_bf16"].to_dtype(DType::BF16).to_le_bytes()
    );
    let off = expected["embed.noop_bf16"].to_f64_vec().into_iter();
    let off = off
        .zip(expected["embed.base_bf16"].to_f64_vec())
        .map(|(a, b)| (a - b).abs());
    assert!((off.fold(0.0, f64::max) - 0.0078).abs() < 1e-4);
}

/// PEFT's constructor accepts duplicate, negative, empty, scalar, fractional and boolean ids; with duplicates the last row
/// wins while all of them train. Here a token set is made of distinct ids of the table, or not at all; the forms that Rust's
/// types rule out are refused in files, by their index.
#[test]
fn f04_ids_are_checked_when_they_are_given() {
    assert_eq!(
        TokenSet::new([5, 9, 5], 10),
        Err(Error::DuplicateToken {
            id: TokenId(5),
            first: 0,
            second: 2
        })
    );
    assert_eq!(
        TokenSet::new([5, 10], 10),
        Err(Error::TokenOutOfRange {
            id: 10,
            vocab_size: 10
        })
    );
    for ids in [
        "[1, -1]",
        "3",
        "[1, 2.5]",
        "[1, true]",
        "[1, \"2\"]",
        "[7, 7]",
        "[1, 4294967296]",
    ] {
        let json = format!(
            r#"{{"peft_type": "TRAINABLE_TOKENS", "target_modules": ["emb"], "token_indices": {ids}}}"#
        );
        let error =
            trainable_tokens::format::AdapterConfig::from_json(json.as_bytes(), "adapter_config.json")
                .unwrap_err();
        assert!(error.to_string().contains("token_indices"), "{ids}: {error}");
    }
}

/// In PEFT a trained token that is the embedding's `padding_idx` gets no gradient from the lookup, and nothing says so.
/// Here the rule is a choice of the layer's options, and the command line refuses such a token until one is made.
#[test]
fn f06_the_padding_token_trains_by_choice() {
    let gradient = |rule| {
        let table = NdTable::new(Array2::<f32>::zeros((8, 2))).unwrap();
        let padding = Some(Padding {
            token: TokenId(3),
            rule,
        });
        let layer = TrainableTokens::new(table, TokenSet::new([3, 1], 8).unwrap())
            .unwrap()
            .with_options(LayerOptions {
                padding,
                ..LayerOptions::default()
            });
        let plan = layer.plan(&[3, 1]).unwrap();
        let gradients = layer.backward(&plan, Array2::<f32>::ones((2, 2)).view()).unwrap();
        layer.gradient(&gradients).unwrap().to_f32_vec()
    };
    assert_eq!(gradient(PaddingRule::NoLookupGradient), [0.0, 0.0, 1.0, 1.0]);
    assert_eq!(gradient(PaddingRule::Train), [1.0; 4]);
}

/// PEFT's AdamW decays rows of absent tokens toward zero: with a weight decay of 0.1 and a rate of 0.1, fifty steps leave
/// 0.605 of them. The default here is torch's, with a decay of 0; a hook decays toward the original rows instead, where
/// such a row stays.
#[test]
fn f07_absent_rows_need_not_decay() {
    let run = |config: AdamConfig, hook: Option<&mut DecayTowardOriginal>| {
        let table = NdTable::new(Array2::<f32>::ones((8, 2))).unwrap();
        let mut layer: TrainableTokens<_> =
            TrainableTokens::new(table, TokenSet::new([3], 8).unwrap()).unwrap();
        let mut adam = Adam::new(config).unwrap();
        let mut hook = hook;
        for _ in 0..50 {
            let zero = TokenRows::zeros(DType::F32, 1, 2);
            match hook.as_deref_mut() {
                Some(hook) => layer.step_with(zero, &mut adam, &mut [hook]).unwrap(),
                None => layer.step_with(zero, &mut adam, &mut []).unwrap(),
            };
        }
        layer.rows().unwrap().to_f32_vec()[0]
    };
    let adamw = AdamConfig {
        lr: 0.1,
        ..AdamConfig::ADAMW
    };
    let decayed = AdamConfig {
        weight_decay: 0.1,
        ..adamw
    };
    assert!((run(decayed, None) - 0.605).abs() < 1e-3);
    assert_eq!(run(adamw, None), 1.0);
    let original = TokenRows::new(vec![1f32; 2], 1, 2).unwrap();
    let mut hook = DecayTowardOriginal::new(0.1, original).unwrap();
    assert_eq!(run(adamw, Some(&mut hook)), 1.0);
}

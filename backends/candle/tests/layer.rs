//! The layer's behaviour, case by case.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
use common::{DTYPES, assert_close, bytes, noise, values};
use trainable_tokens_candle::{CandleTable, TrainableTokens};
use trainable_tokens_core::{
    BackendError, EmbedScale, ErrorKind, LayerOptions, Padding, PaddingRule, Sgd, SgdConfig, TokenId,
    TokenRows,
};

fn layer(dtype: DType) -> TrainableTokens {
    TrainableTokens::from_tensor(noise(&[10, 4], dtype, 1), &[7, 2]).unwrap()
}

fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

#[test]
fn ids_of_any_integer_type_shape_and_layout() {
    let layer = layer(DType::F32);
    let batch = Tensor::new(&[[7u32, 1, 2], [0, 9, 7]], &Device::Cpu).unwrap();
    let want = bytes(&layer.forward(&batch).unwrap());
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let out = layer.forward(&batch.to_dtype(dtype).unwrap()).unwrap();
        assert_eq!(
            (out.dims(), bytes(&out)),
            (&[2, 3, 4][..], want.clone()),
            "{dtype:?}"
        );
    }
    let strided = layer.forward(&batch.t().unwrap()).unwrap();
    assert_eq!(strided.dims(), [3, 2, 4]);
    assert_eq!(
        bytes(&strided.transpose(0, 1).unwrap().contiguous().unwrap()),
        want
    );
    assert_eq!(
        layer
            .forward(&Tensor::new(7u32, &Device::Cpu).unwrap())
            .unwrap()
            .dims(),
        [4]
    );
    let empty = layer
        .forward(&Tensor::zeros((2, 0), DType::I64, &Device::Cpu).unwrap())
        .unwrap();
    assert_eq!(empty.dims(), [2, 0, 4]);
}

#[test]
fn ids_that_name_no_row_are_refused() {
    let layer = layer(DType::F32);
    for (id, text) in [
        (-1i64, "token id -1 is"),
        (10, "token id 10 is"),
        (1 << 40, "token id 1099511627776 is"),
    ] {
        let ids = Tensor::new(&[3, id], &Device::Cpu).unwrap();
        let error = layer.lookup(&ids).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
        assert!(error.to_string().contains(text), "{error}");
        assert!(layer.forward(&ids).unwrap_err().to_string().contains(text));
    }
    let largest = layer.lookup(&ids(&[u32::MAX])).unwrap_err();
    assert_eq!(largest.kind(), ErrorKind::TokenOutOfRange);
    let floats = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    assert_eq!(layer.lookup(&floats).unwrap_err().kind(), ErrorKind::DType);
}

#[test]
fn tables_and_tokens_that_do_not_fit_are_refused() {
    let kind = |table: Tensor, ids: &[u32]| TrainableTokens::from_tensor(table, ids).unwrap_err().kind();
    let table = noise(&[10, 4], DType::F32, 1);
    assert_eq!(kind(noise(&[10], DType::F32, 1), &[1]), ErrorKind::Shape);
    assert_eq!(kind(table.t().unwrap(), &[1]), ErrorKind::Unsupported);
    assert_eq!(kind(table.to_dtype(DType::U32).unwrap(), &[1]), ErrorKind::DType);
    assert_eq!(kind(table.clone(), &[10]), ErrorKind::TokenOutOfRange);
    assert_eq!(kind(table.clone(), &[1, 1]), ErrorKind::DuplicateToken);
    let rows = TokenRows::new(vec![0f32; 4], 1, 4).unwrap();
    let error = TrainableTokens::with_rows(table, &[1, 2], &rows).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

#[test]
fn a_batch_without_trainable_tokens_has_a_zero_gradient() {
    let layer = layer(DType::F32);
    for batch in [&[1u32, 3][..], &[]] {
        let loss = layer.forward(&ids(batch)).unwrap().sum_all().unwrap();
        let gradient = layer.gradient(&loss.backward().unwrap()).unwrap();
        assert!(gradient.bits_eq(&TokenRows::zeros(gradient.dtype(), 2, 4)));
    }
}

#[test]
fn a_cut_graph_is_an_error() {
    let mut layer = layer(DType::F32);
    let mut sgd = Sgd::new(SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    })
    .unwrap();
    let cut = Var::new(&[1f32], &Device::Cpu).unwrap();
    let out = layer.forward(&ids(&[7])).unwrap().detach().sum_all().unwrap();
    let gradients = (cut.sum_all().unwrap() * out).unwrap().backward().unwrap();
    let error = layer.step(&gradients, &mut sgd, &mut []).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);

    // Candle's fused norm has no backward pass.
    let norm = candle_nn::RmsNorm::new(Tensor::ones(4, DType::F32, &Device::Cpu).unwrap(), 1e-6);
    let out = norm
        .forward(&layer.forward(&ids(&[7])).unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let error = layer.gradient(&out.backward().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);
}

#[test]
fn a_scale_multiplies_after_the_override_and_keeps_negative_zero() {
    for dtype in DTYPES {
        let table = Tensor::new(&[[-0.0f64, 1.5], [3.1, -2.2]], &Device::Cpu).unwrap();
        let table = table.to_dtype(dtype).unwrap();
        for scale in [EmbedScale::Exact(5.656_854), EmbedScale::TableDType(5.656_854)] {
            let options = LayerOptions {
                scale: Some(scale),
                ..LayerOptions::default()
            };
            let layer = TrainableTokens::from_tensor(table.clone(), &[1])
                .unwrap()
                .with_options(options);
            let out = values(&layer.forward(&ids(&[0, 1])).unwrap());
            assert!(out[0] == 0.0 && out[0].is_sign_negative(), "{dtype:?}");
            let factor = layer.layer().transform().scale.unwrap();
            let computed = if dtype == DType::F64 {
                DType::F64
            } else {
                DType::F32
            };
            let factor = Tensor::new(&[factor], &Device::Cpu)
                .unwrap()
                .to_dtype(computed)
                .unwrap();
            let want = table
                .to_dtype(computed)
                .unwrap()
                .broadcast_mul(&factor)
                .unwrap()
                .to_dtype(dtype);
            assert_eq!(out[1..], values(&want.unwrap())[1..]);
            let logits = layer.tied_head().forward(&table).unwrap();
            assert_eq!(bytes(&logits), bytes(&table.matmul(&table.t().unwrap()).unwrap()));
        }
    }
}

#[test]
fn a_padding_token_follows_its_rule() {
    for (rule, want) in [(PaddingRule::NoLookupGradient, 0.0), (PaddingRule::Train, 2.0)] {
        let padding = Some(Padding {
            token: TokenId(7),
            rule,
        });
        let layer = layer(DType::F32).with_options(LayerOptions {
            padding,
            ..LayerOptions::default()
        });
        let loss = layer.forward(&ids(&[7, 2, 7])).unwrap().sum_all().unwrap();
        let gradient = layer.gradient(&loss.backward().unwrap()).unwrap();
        assert_eq!(gradient.to_f64_vec(), [[want; 4], [1.0; 4]].concat());
    }
}

#[test]
fn a_table_that_was_a_variable_is_frozen() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let embed = candle_nn::embedding(10, 4, vb).unwrap();
    let layer = TrainableTokens::wrap(embed.clone(), &[3]).unwrap();
    let gradients = layer
        .forward(&ids(&[3, 4]))
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(gradients.get(embed.embeddings()).is_none());
    assert!(gradients.get(&layer.var().unwrap()).is_some());
}

#[test]
fn candles_own_optimizer_trains_the_rows() {
    let layer = layer(DType::BF16);
    let mut adam = candle_nn::AdamW::new_lr(vec![layer.var().unwrap()], 0.05).unwrap();
    let loss = |layer: &TrainableTokens| {
        let out = layer
            .forward(&ids(&[7, 1, 2]))
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        (out - 0.5).unwrap().sqr().unwrap().mean_all().unwrap()
    };
    let before = loss(&layer).to_scalar::<f32>().unwrap();
    for _ in 0..20 {
        adam.backward_step(&loss(&layer)).unwrap();
    }
    assert!(loss(&layer).to_scalar::<f32>().unwrap() < 0.7 * before);
}

#[test]
fn a_view_into_a_larger_tensor_works_in_place() {
    for dtype in DTYPES {
        let whole = noise(&[30, 4], dtype, 1);
        let view = whole.narrow(0, 10, 12).unwrap();
        let mut layer = TrainableTokens::from_tensor(view.clone(), &[0, 11]).unwrap();
        let batch = ids(&[11, 5, 0]);
        assert_eq!(
            bytes(&layer.forward(&batch).unwrap()),
            bytes(&view.index_select(&batch, 0).unwrap())
        );
        let hidden = noise(&[2, 4], dtype, 2);
        let logits = layer.tied_head().forward(&hidden).unwrap();
        assert_close(
            "logits",
            &values(&logits),
            &values(&hidden.matmul(&view.t().unwrap()).unwrap()),
            1e-2,
        );
        let before = bytes(&whole);
        let rows = TokenRows::new(vec![0.25f32; 8], 2, 4).unwrap();
        layer.set_rows(&rows).unwrap();
        layer.merge().unwrap();
        let changed = values(&whole)
            .chunks(4)
            .map(|row| row == [0.25; 4])
            .collect::<Vec<_>>();
        assert!(
            changed
                .iter()
                .enumerate()
                .all(|(row, changed)| *changed == [10, 21].contains(&row))
        );
        layer.unmerge().unwrap();
        assert_eq!(bytes(&whole), before);
    }
}

#[test]
fn a_refused_write_changes_nothing() {
    use trainable_tokens_core::WriteRows;
    let tensor = noise(&[5, 2], DType::F32, 1);
    let mut table = CandleTable::new(tensor.clone()).unwrap();
    let before = bytes(&tensor);
    let rows = |len: usize| TokenRows::new(vec![1f32; len * 2], len, 2).unwrap();
    let kind = |table: &mut CandleTable, ids: &[u32], rows: &TokenRows| {
        let ids: Vec<_> = ids.iter().map(|id| TokenId(*id)).collect();
        table.write_rows(&ids, rows).unwrap_err().kind()
    };
    assert_eq!(kind(&mut table, &[0, 5], &rows(2)), ErrorKind::TokenOutOfRange);
    assert_eq!(kind(&mut table, &[0], &rows(2)), ErrorKind::Shape);
    let half = rows(1).to_dtype(trainable_tokens_core::DType::BF16);
    assert_eq!(kind(&mut table, &[0], &half), ErrorKind::DType);
    assert_eq!(bytes(&tensor), before);
}

//! The fused loss against logits and their cross-entropy.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::Module;
use common::{DTYPES, assert_close, bytes, noise, tolerance, values};
use trainable_tokens_candle::{FrozenLinear, TrainableTokens};
use trainable_tokens_core::{
    BackendError, CrossEntropyOptions, ErrorKind, LogitsChunk, Overlap, Reduction, Softcap,
};

const VOCAB: usize = 23;
const DIM: usize = 5;
const LABELS: [i64; 6] = [4, -100, 22, 0, 4, 9];

fn labels(labels: &[i64]) -> Tensor {
    Tensor::new(labels, &Device::Cpu).unwrap()
}

fn layer(dtype: DType) -> TrainableTokens {
    let mut layer = TrainableTokens::from_tensor(noise(&[VOCAB, DIM], dtype, 1), &[9, 4, 17]).unwrap();
    let rows = noise(&[3, DIM], DType::F64, 2);
    let rows = trainable_tokens_core::TokenRows::new(values(&rows), 3, DIM).unwrap();
    layer.set_rows(&rows).unwrap();
    layer
}

fn hidden(dtype: DType) -> Var {
    Var::from_tensor(&noise(&[LABELS.len(), DIM], dtype, 3)).unwrap()
}

fn all_options() -> Vec<CrossEntropyOptions> {
    let mut all = Vec::new();
    for softcap in [None, Some(Softcap::new(0.7).unwrap())] {
        for reduction in [Reduction::Mean, Reduction::Sum] {
            for (ignore_index, rows) in [(None, 1), (Some(4), 2), (None, 6), (Some(0), 7)] {
                all.push(CrossEntropyOptions {
                    softcap,
                    reduction,
                    ignore_index,
                    chunk: LogitsChunk::rows(rows).unwrap(),
                });
            }
        }
    }
    all
}

/// The definition, of differentiable operations: `logits` `[N, V]`.
fn unfused(logits: &Tensor, labels: &[i64], options: CrossEntropyOptions) -> Tensor {
    let counts = |label: &i64| *label != -100 && Some(*label) != options.ignore_index;
    let rows: Vec<u32> = (0u32..)
        .zip(labels)
        .filter(|(_, label)| counts(label))
        .map(|(row, _)| row)
        .collect();
    let ids: Vec<u32> = labels
        .iter()
        .filter(|label| counts(label))
        .map(|label| u32::try_from(*label).unwrap())
        .collect();
    let n = rows.len();
    let rows = Tensor::from_vec(rows, n, &Device::Cpu).unwrap();
    let ids = Tensor::from_vec(ids, (n, 1), &Device::Cpu).unwrap();
    let mut logits = logits.index_select(&rows, 0).unwrap();
    if logits.dtype() != DType::F64 {
        logits = logits.to_dtype(DType::F32).unwrap();
    }
    if let Some(softcap) = options.softcap {
        logits = ((logits / softcap.get()).unwrap().tanh().unwrap() * softcap.get()).unwrap();
    }
    let normalizer = logits
        .exp()
        .unwrap()
        .sum_keepdim(D::Minus1)
        .unwrap()
        .log()
        .unwrap();
    let losses = (normalizer - logits.gather(&ids, D::Minus1).unwrap()).unwrap();
    match options.reduction {
        Reduction::Mean => losses.mean_all().unwrap(),
        Reduction::Sum => losses.sum_all().unwrap(),
    }
}

fn gradient(gradients: &GradStore, of: &Tensor) -> Vec<f64> {
    values(gradients.get(of).unwrap())
}

#[test]
fn loss_and_gradients_are_those_of_the_logits() {
    for dtype in DTYPES {
        let (layer, hidden) = (layer(dtype), hidden(dtype));
        let biased = layer.tied_head().with_bias(&noise(&[VOCAB], dtype, 7)).unwrap();
        for head in [layer.tied_head(), biased] {
            for options in all_options() {
                let want = unfused(&head.logits(&hidden).unwrap(), &LABELS, options);
                let got = head.cross_entropy(&hidden, &labels(&LABELS), options).unwrap();
                assert_eq!((got.dims(), got.dtype()), (&[][..], want.dtype()));
                let tolerance = tolerance(dtype);
                assert_close("loss", &values(&got), &values(&want), tolerance);
                let evaluated = head
                    .evaluate_cross_entropy(&hidden, &labels(&LABELS), options)
                    .unwrap();
                assert_close("loss alone", &values(&evaluated), &values(&got), 1e-6);
                // An upstream gradient that is not one.
                let [got, want] = [got, want].map(|loss| (loss * -3.5).unwrap().backward().unwrap());
                let var = layer.var().unwrap();
                for (what, of) in [("hidden", hidden.as_tensor()), ("rows", var.as_tensor())] {
                    assert_eq!(got.get(of).unwrap().dtype(), of.dtype());
                    assert_close(what, &gradient(&got, of), &gradient(&want, of), tolerance);
                }
            }
        }
    }
}

#[test]
fn a_frozen_head_gives_gradients_to_its_input_alone() {
    for dtype in DTYPES {
        let linear =
            FrozenLinear::new(noise(&[VOCAB, DIM], dtype, 1), Some(noise(&[VOCAB], dtype, 7))).unwrap();
        let hidden = hidden(dtype);
        for options in all_options() {
            let want = unfused(&linear.forward(&hidden).unwrap(), &LABELS, options);
            let got = linear.cross_entropy(&hidden, &labels(&LABELS), options).unwrap();
            let evaluated = linear
                .evaluate_cross_entropy(&hidden, &labels(&LABELS), options)
                .unwrap();
            assert_close("loss", &values(&got), &values(&want), tolerance(dtype));
            assert_close("loss alone", &values(&evaluated), &values(&got), 1e-6);
            let [got, want] = [got, want].map(|loss| loss.backward().unwrap());
            let got = gradient(&got, &hidden);
            assert_close("hidden", &got, &gradient(&want, &hidden), tolerance(dtype));
        }
    }
}

#[test]
fn leading_dimensions_and_label_types_are_free() {
    let (layer, flat) = (layer(DType::F32), hidden(DType::F32));
    let head = layer.tied_head();
    let options = CrossEntropyOptions::default();
    let want = head.cross_entropy(&flat, &labels(&LABELS), options).unwrap();
    // Hidden states that are not contiguous.
    let turned = flat
        .reshape((2, 3, DIM))
        .unwrap()
        .transpose(0, 1)
        .unwrap()
        .contiguous()
        .unwrap();
    let turned = turned.transpose(0, 1).unwrap();
    let shaped = labels(&LABELS).reshape((2, 3)).unwrap();
    for dtype in [DType::I64, DType::I32, DType::I16] {
        let got = head
            .cross_entropy(&turned, &shaped.to_dtype(dtype).unwrap(), options)
            .unwrap();
        assert_eq!(bytes(&got), bytes(&want), "{dtype:?}");
    }
    let unsigned = Tensor::new(&[4u32, 5, 22, 0, 4, 9], &Device::Cpu).unwrap();
    let options = CrossEntropyOptions {
        ignore_index: Some(5),
        ..options
    };
    let got = head.cross_entropy(&flat, &unsigned, options).unwrap();
    assert_eq!(bytes(&got), bytes(&want));
}

#[test]
fn a_loss_may_be_used_again() {
    let (layer, hidden) = (layer(DType::F64), hidden(DType::F64));
    let head = layer.tied_head();
    let var = layer.var().unwrap();
    let options = CrossEntropyOptions::default();
    let loss = head.cross_entropy(&hidden, &labels(&LABELS), options).unwrap();
    let once = loss.backward().unwrap();
    let again = loss.backward().unwrap();
    let twice = (&loss + &loss).unwrap().backward().unwrap();
    // A loss of its own square, and beside another loss.
    let squared = loss.sqr().unwrap().backward().unwrap();
    let other = head.cross_entropy(&hidden, &labels(&[1; 6]), options).unwrap();
    let both = (&loss + &other).unwrap().backward().unwrap();
    let other = other.backward().unwrap();
    let factor = 2.0 * loss.to_scalar::<f64>().unwrap();
    for of in [hidden.as_tensor(), var.as_tensor()] {
        let times = |factor: f64| -> Vec<f64> { gradient(&once, of).iter().map(|x| x * factor).collect() };
        assert_eq!(gradient(&again, of), times(1.0));
        assert_close("twice", &gradient(&twice, of), &times(2.0), 1e-14);
        assert_close("squared", &gradient(&squared, of), &times(factor), 1e-14);
        let sum: Vec<f64> = times(1.0)
            .iter()
            .zip(gradient(&other, of))
            .map(|(x, y)| x + y)
            .collect();
        assert_close("both", &gradient(&both, of), &sum, 1e-14);
    }
}

#[test]
fn untrained_rows_are_a_no_op() {
    for dtype in DTYPES {
        let base = noise(&[VOCAB, DIM], dtype, 1);
        let layer = TrainableTokens::from_tensor(base.clone(), &[9, 4]).unwrap();
        let frozen = FrozenLinear::new(base, None).unwrap();
        let (hidden, options) = (hidden(dtype), CrossEntropyOptions::default());
        let want = frozen.cross_entropy(&hidden, &labels(&LABELS), options).unwrap();
        let got = layer
            .tied_head()
            .cross_entropy(&hidden, &labels(&LABELS), options)
            .unwrap();
        assert_eq!(bytes(&got), bytes(&want), "{dtype:?}");
        let gradients = got.backward().unwrap();
        let of_rows = gradient(&gradients, &layer.var().unwrap());
        assert!(of_rows.iter().all(|x| *x != 0.0), "untrained rows train");
    }
}

#[test]
fn rows_that_do_not_count_cost_and_change_nothing() {
    let (layer, options) = (layer(DType::F32), CrossEntropyOptions::default());
    let head = layer.tied_head();
    let plain = noise(&[LABELS.len(), DIM], DType::F32, 3);
    let mut rows: Vec<f32> = plain.flatten_all().unwrap().to_vec1().unwrap();
    rows[DIM..2 * DIM].fill(f32::NAN);
    let poisoned = Var::from_vec(rows, (LABELS.len(), DIM), &Device::Cpu).unwrap();
    let want = head.cross_entropy(&plain, &labels(&LABELS), options).unwrap();
    let got = head.cross_entropy(&poisoned, &labels(&LABELS), options).unwrap();
    assert_eq!(bytes(&got), bytes(&want));
    let of_hidden = gradient(&got.backward().unwrap(), &poisoned);
    assert_eq!(of_hidden[DIM..2 * DIM], [0.0; DIM]);
    assert!(of_hidden.iter().all(|x| x.is_finite()));
}

#[test]
fn only_what_has_a_graph_gets_gradients() {
    let (layer, hidden) = (layer(DType::F32), hidden(DType::F32));
    let (head, options) = (layer.tied_head(), CrossEntropyOptions::default());
    let loss = |hidden: &Tensor| head.cross_entropy(hidden, &labels(&LABELS), options).unwrap();
    let whole = loss(&hidden).backward().unwrap();
    let rows_alone = loss(&hidden.detach()).backward().unwrap();
    let var = layer.var().unwrap();
    assert_eq!(gradient(&rows_alone, &var), gradient(&whole, &var));
    assert!(rows_alone.get(&hidden).is_none());

    let evaluated = head.evaluate_cross_entropy(&hidden, &labels(&LABELS), options);
    assert!(!evaluated.unwrap().track_op());
    let frozen = FrozenLinear::new(noise(&[VOCAB, DIM], DType::F32, 1), None).unwrap();
    let detached = frozen.cross_entropy(&hidden.detach(), &labels(&LABELS), options);
    assert!(!detached.unwrap().track_op());
}

#[test]
fn several_merged_and_disabled_adapters_count_as_for_the_logits() {
    let (mut layer, hidden) = (layer(DType::F64), hidden(DType::F64));
    layer.add_adapter("other", &[4, 0]).unwrap();
    let options = CrossEntropyOptions::default();
    let check = |layer: &TrainableTokens, names: &[&str]| {
        let head = layer.tied_head();
        let want = unfused(&head.logits(&hidden).unwrap(), &LABELS, options);
        let got = head.cross_entropy(&hidden, &labels(&LABELS), options).unwrap();
        assert_close("loss", &values(&got), &values(&want), 1e-12);
        let [got, want] = [got, want].map(|loss| loss.backward().unwrap());
        assert_close(
            "hidden",
            &gradient(&got, &hidden),
            &gradient(&want, &hidden),
            1e-12,
        );
        for name in names {
            let of = |gradients| layer.adapter(name).unwrap().gradient(gradients).unwrap();
            let [got, want] = [of(&got).to_f64_vec(), of(&want).to_f64_vec()];
            assert_close(name, &got, &want, 1e-12);
        }
    };
    let weights = Overlap::WeightedMean(vec![1.0, 3.0]);
    layer
        .activate_overlapping(&["default", "other"], weights)
        .unwrap();
    check(&layer, &["default", "other"]);
    layer.activate(&["other"]).unwrap();
    check(&layer, &["other"]);
    layer.disable().unwrap();
    check(&layer, &[]);
    layer.enable();
    layer.merge().unwrap();
    check(&layer, &[]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (layer, hidden) = (layer(DType::F32), hidden(DType::F32));
    let (head, options) = (layer.tied_head(), CrossEntropyOptions::default());
    let refused = |hidden: &Tensor, labels: &Tensor| {
        let error = head.cross_entropy(hidden, labels, options).unwrap_err();
        let frozen = FrozenLinear::new(noise(&[VOCAB, DIM], DType::F32, 1), None).unwrap();
        let other = frozen
            .evaluate_cross_entropy(hidden, labels, options)
            .unwrap_err();
        assert_eq!(error.to_string(), other.to_string());
        (error.kind(), error.to_string())
    };
    let (kind, text) = refused(&hidden, &labels(&[4, -100, 22, 23, 4, 9]));
    assert_eq!(kind, ErrorKind::TokenOutOfRange);
    assert!(text.contains("23 at position 3"), "{text}");
    assert_eq!(refused(&hidden, &labels(&[-100; 6])).0, ErrorKind::AllIgnored);
    assert_eq!(refused(&hidden, &labels(&[1; 5])).0, ErrorKind::Shape);
    let matrix = labels(&[1; 6]).unsqueeze(0).unwrap();
    assert_eq!(refused(&hidden, &matrix).0, ErrorKind::Shape);
    let floats = noise(&[6], DType::F32, 1);
    assert_eq!(refused(&hidden, &floats).0, ErrorKind::DType);
    let wide = noise(&[6, DIM + 1], DType::F32, 1);
    assert_eq!(refused(&wide, &labels(&LABELS)).0, ErrorKind::Shape);
    let double = noise(&[6, DIM], DType::F64, 1);
    assert_eq!(refused(&double, &labels(&LABELS)).0, ErrorKind::DType);
    let none = noise(&[0, DIM], DType::F32, 1);
    let no_labels = Tensor::zeros(0, DType::I64, &Device::Cpu).unwrap();
    assert_eq!(refused(&none, &no_labels).0, ErrorKind::AllIgnored);
}

#[test]
fn the_sum_of_nothing_is_zero() {
    let (layer, hidden) = (layer(DType::BF16), hidden(DType::BF16));
    let options = CrossEntropyOptions {
        reduction: Reduction::Sum,
        ..CrossEntropyOptions::default()
    };
    let head = layer.tied_head();
    let loss = head.cross_entropy(&hidden, &labels(&[-100; 6]), options).unwrap();
    assert_eq!(values(&loss), [0.0]);
    let gradients = loss.backward().unwrap();
    assert_eq!(gradient(&gradients, &hidden), [0.0; 6 * DIM]);
    assert_eq!(gradient(&gradients, &layer.var().unwrap()), [0.0; 3 * DIM]);
    let none = noise(&[0, DIM], DType::BF16, 1);
    let no_labels = Tensor::zeros(0, DType::I64, &Device::Cpu).unwrap();
    let loss = head.cross_entropy(&none, &no_labels, options).unwrap();
    assert_eq!(
        gradient(&loss.backward().unwrap(), &layer.var().unwrap()),
        [0.0; 3 * DIM]
    );
}

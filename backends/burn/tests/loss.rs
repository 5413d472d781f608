//! The fused loss against that of the logits.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{DType, Gradients, Int, Tensor, TensorData};
use common::{DTYPES, assert_close, bytes, device, noise, values};
use proptest::prelude::*;
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{
    BackendError, CrossEntropyOptions, ErrorKind, LogitsChunk, Overlap, Reduction, Softcap, TokenRows,
    TokenSet,
};

const VOCAB: usize = 23;
const DIM: usize = 5;
const LABELS: [i64; 6] = [4, -100, 22, 0, 4, 9];

fn labels(labels: &[i64]) -> Tensor<1, Int> {
    Tensor::from_data(
        TensorData::new(labels.to_vec(), [labels.len()]),
        (&device(), DType::I64),
    )
}

/// A layer whose rows differ from the base's.
fn trained(vocab: usize, dim: usize, dtype: DType, tokens: &[u32]) -> TrainableTokens {
    let weight = Param::from_tensor(noise([vocab, dim], dtype, 1));
    let mut layer = TrainableTokens::wrap(Embedding { weight }, tokens).unwrap();
    let rows = values(&noise([tokens.len(), dim], DType::F64, 2));
    layer
        .set_rows(&TokenRows::new(rows, tokens.len(), dim).unwrap())
        .unwrap();
    layer
}

fn layer(dtype: DType) -> TrainableTokens {
    trained(VOCAB, DIM, dtype, &[9, 4, 17])
}

fn hidden(dtype: DType) -> Tensor<2> {
    noise([LABELS.len(), DIM], dtype, 3).require_grad()
}

/// The definition, of differentiable operations.
fn unfused(logits: Tensor<2>, labels: &[i64], options: CrossEntropyOptions) -> Tensor<1> {
    let counts = |label: &i64| *label != -100 && Some(*label) != options.ignore_index;
    let (rows, ids): (Vec<i64>, Vec<i64>) = (0i64..).zip(labels).filter(|(_, label)| counts(label)).unzip();
    let [rows, ids] = [rows, ids].map(|ids| self::labels(&ids));
    let mut logits = logits.select(0, rows);
    if logits.dtype() != DType::F64 {
        logits = logits.cast(DType::F32);
    }
    if let Some(softcap) = options.softcap {
        // Burn's backward passes of scalars round them to f32.
        let softcap = Tensor::full(logits.shape(), softcap.get(), (&device(), logits.dtype()));
        logits = (logits / softcap.clone()).tanh() * softcap;
    }
    let normalizer = logits.clone().exp().sum_dim(1).log();
    let losses = normalizer - logits.gather(1, ids.unsqueeze_dim(1));
    match options.reduction {
        Reduction::Mean => losses.mean(),
        Reduction::Sum => losses.sum(),
    }
}

fn of_hidden(hidden: &Tensor<2>, gradients: &Gradients) -> Vec<f64> {
    values(&hidden.grad(gradients).unwrap())
}

fn of_rows(layer: &TrainableTokens, gradients: &Gradients) -> Vec<f64> {
    layer.gradient(gradients).unwrap().to_f64_vec()
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

#[derive(Clone, Debug)]
struct Setup {
    vocab: usize,
    dim: usize,
    dtype: DType,
    tokens: Vec<u32>,
    labels: Vec<i64>,
    options: CrossEntropyOptions,
}

fn setup() -> impl Strategy<Value = Setup> {
    let sizes = (1..24usize, 1..9usize, 0..4usize, 1..14usize);
    let settings = (prop::option::of(0.5..5.0f64), any::<bool>(), any::<bool>());
    (sizes, settings).prop_flat_map(|((vocab, dim, dtype, chunk), (softcap, mean, ignore))| {
        let last = u32::try_from(vocab).unwrap();
        let all: Vec<u32> = (0..last).collect();
        let tokens = proptest::sample::subsequence(all, 0..=vocab).prop_shuffle();
        let label = prop_oneof![4 => 0..i64::from(last), 1 => Just(-100)];
        let labels = prop::collection::vec(label, 1..12);
        let options = CrossEntropyOptions {
            softcap: softcap.map(|softcap| Softcap::new(softcap).unwrap()),
            reduction: if mean { Reduction::Mean } else { Reduction::Sum },
            ignore_index: ignore.then_some(0),
            chunk: LogitsChunk::rows(chunk).unwrap(),
        };
        (tokens, labels).prop_map(move |(tokens, labels)| Setup {
            vocab,
            dim,
            dtype: DTYPES[dtype],
            tokens,
            labels,
            options,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn loss_and_gradients_are_those_of_the_logits(setup in setup()) {
        let Setup { vocab, dim, dtype, tokens, labels: ids, options } = setup;
        let layer = trained(vocab, dim, dtype, &tokens);
        let head = layer.tied_head().with_bias(noise([vocab], dtype, 7)).unwrap();
        let hidden = noise([ids.len(), dim], dtype, 3).require_grad();
        let got = head.cross_entropy(hidden.clone(), labels(&ids), options);
        let counts = |label: &i64| *label != -100 && Some(*label) != options.ignore_index;
        if !ids.iter().any(counts) {
            if options.reduction == Reduction::Mean {
                prop_assert_eq!(got.unwrap_err().kind(), ErrorKind::AllIgnored);
            } else {
                prop_assert_eq!(values(&got.unwrap()), [0.0]);
            }
            return Ok(());
        }
        let (got, want) = (got.unwrap(), unfused(head.logits(hidden.clone()).unwrap(), &ids, options));
        prop_assert_eq!(got.dtype(), want.dtype());
        let tolerance = tolerance(dtype);
        assert_close("loss", &values(&got), &values(&want), tolerance);
        // An upstream gradient that is not one.
        let [got, want] = [got, want].map(|loss| backward(&loss.mul_scalar(-3.5)).unwrap());
        assert_close("hidden", &of_hidden(&hidden, &got), &of_hidden(&hidden, &want), tolerance);
        if !tokens.is_empty() {
            assert_close("rows", &of_rows(&layer, &got), &of_rows(&layer, &want), tolerance);
        }
    }
}

#[test]
fn untrained_rows_are_a_no_op() {
    for dtype in DTYPES {
        let weight = || Param::from_tensor(noise([VOCAB, DIM], dtype, 1));
        let [frozen, fresh] = [&[][..], &[9, 4]]
            .map(|tokens| TrainableTokens::wrap(Embedding { weight: weight() }, tokens).unwrap());
        let loss = |layer: &TrainableTokens| {
            let options = CrossEntropyOptions::default();
            layer
                .tied_head()
                .cross_entropy(hidden(dtype), labels(&LABELS), options)
                .unwrap()
        };
        let got = loss(&fresh);
        assert_eq!(bytes(&got), bytes(&loss(&frozen)), "{dtype:?}");
        let gradient = of_rows(&fresh, &backward(&got).unwrap());
        assert!(gradient.iter().all(|x| *x != 0.0), "untrained rows train");
    }
}

#[test]
fn a_loss_may_be_used_again() {
    let (layer, hidden) = (layer(DType::F64), hidden(DType::F64));
    let head = layer.tied_head();
    let loss = || {
        let options = CrossEntropyOptions::default();
        head.cross_entropy(hidden.clone(), labels(&LABELS), options)
            .unwrap()
    };
    let once = backward(&loss()).unwrap();
    let factor = 2.0 * values(&loss())[0];
    let squared = loss();
    for (what, factor, loss) in [
        ("twice", 2.0, loss() + loss()),
        ("squared", factor, squared.clone() * squared),
    ] {
        let gradients = backward(&loss).unwrap();
        let times = |values: Vec<f64>| values.into_iter().map(|x| x * factor).collect::<Vec<_>>();
        assert_close(
            what,
            &of_hidden(&hidden, &gradients),
            &times(of_hidden(&hidden, &once)),
            1e-13,
        );
        assert_close(
            what,
            &of_rows(&layer, &gradients),
            &times(of_rows(&layer, &once)),
            1e-13,
        );
    }
}

#[test]
fn leading_dimensions_are_free() {
    let (layer, hidden) = (layer(DType::F32), hidden(DType::F32));
    let (head, options) = (layer.tied_head(), CrossEntropyOptions::default());
    let want = head
        .cross_entropy(hidden.clone(), labels(&LABELS), options)
        .unwrap();
    let shaped = labels(&LABELS).reshape([2, 3]);
    let got = head
        .cross_entropy(hidden.reshape([2, 3, DIM]), shaped, options)
        .unwrap();
    assert_eq!(bytes(&got), bytes(&want));
}

#[test]
fn rows_that_do_not_count_change_nothing() {
    let (layer, options) = (layer(DType::F32), CrossEntropyOptions::default());
    let head = layer.tied_head();
    let mut spoiled = values(&hidden(DType::F32));
    spoiled[DIM..2 * DIM].fill(f64::NAN);
    let data = TensorData::new(spoiled, [LABELS.len(), DIM]);
    let spoiled = Tensor::<2>::from_data(data, (&device(), DType::F32)).require_grad();
    let want = head
        .cross_entropy(hidden(DType::F32), labels(&LABELS), options)
        .unwrap();
    let got = head
        .cross_entropy(spoiled.clone(), labels(&LABELS), options)
        .unwrap();
    assert_eq!(bytes(&got), bytes(&want));
    let gradient = of_hidden(&spoiled, &backward(&got).unwrap());
    assert_eq!(gradient[DIM..2 * DIM], [0.0; DIM]);
    assert!(gradient.iter().all(|x| x.is_finite()));
}

#[test]
fn only_what_has_a_graph_gets_gradients() {
    let (mut layer, hidden) = (layer(DType::F32), hidden(DType::F32));
    let options = CrossEntropyOptions::default();
    let loss = |layer: &TrainableTokens, hidden: Tensor<2>| {
        layer
            .tied_head()
            .cross_entropy(hidden, labels(&LABELS), options)
            .unwrap()
    };
    let whole = loss(&layer, hidden.clone());
    let rows_alone = backward(&loss(&layer, hidden.clone().detach().set_require_grad(false))).unwrap();
    assert_eq!(
        of_rows(&layer, &rows_alone),
        of_rows(&layer, &backward(&whole).unwrap())
    );
    let valid = layer.valid();
    let alone = valid
        .tied_head()
        .cross_entropy(hidden.clone().inner(), labels(&LABELS).inner(), options);
    let alone = alone.unwrap();
    assert!(!alone.is_tracked());
    assert_eq!(values(&alone), values(&whole));
    layer.merge().unwrap();
    // Burn's leaves stay leaves when they are detached.
    assert!(!loss(&layer, hidden.detach().set_require_grad(false)).is_tracked());
}

#[test]
fn several_adapters_count_as_for_the_logits() {
    let (mut layer, hidden) = (layer(DType::F64), hidden(DType::F64));
    let other = TokenSet::new([4, 0], VOCAB).unwrap();
    layer.add_adapter("other", other).unwrap();
    let mean = Overlap::WeightedMean(vec![1.0, 3.0]);
    layer.activate_overlapping(&["default", "other"], mean).unwrap();
    let (head, options) = (layer.tied_head(), CrossEntropyOptions::default());
    let want = unfused(head.logits(hidden.clone()).unwrap(), &LABELS, options);
    let got = head
        .cross_entropy(hidden.clone(), labels(&LABELS), options)
        .unwrap();
    assert_close("loss", &values(&got), &values(&want), 1e-12);
    let [got, want] = [got, want].map(|loss| backward(&loss).unwrap());
    assert_close(
        "hidden",
        &of_hidden(&hidden, &got),
        &of_hidden(&hidden, &want),
        1e-12,
    );
    for name in ["default", "other"] {
        let of = |gradients| {
            layer
                .adapter(name)
                .unwrap()
                .gradient(gradients)
                .unwrap()
                .to_f64_vec()
        };
        assert_close(name, &of(&got), &of(&want), 1e-12);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (layer, options) = (layer(DType::F32), CrossEntropyOptions::default());
    let head = layer.tied_head();
    let refused =
        |hidden: Tensor<2>, ids: &[i64]| head.cross_entropy(hidden, labels(ids), options).unwrap_err();
    let error = refused(hidden(DType::F32), &[4, -100, 22, 23, 4, 9]);
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
    assert!(error.to_string().contains("23 at position 3"), "{error}");
    assert_eq!(
        refused(hidden(DType::F32), &[-100; 6]).kind(),
        ErrorKind::AllIgnored
    );
    assert_eq!(refused(hidden(DType::F32), &[1; 5]).kind(), ErrorKind::Shape);
    assert_eq!(
        refused(noise([6, DIM + 1], DType::F32, 1), &LABELS).kind(),
        ErrorKind::Shape
    );
    assert_eq!(refused(hidden(DType::F64), &LABELS).kind(), ErrorKind::DType);
    let matrix = labels(&LABELS).reshape([2, 3]);
    let error = head
        .cross_entropy(hidden(DType::F32), matrix, options)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

#[test]
fn the_sum_of_nothing_is_zero() {
    let (layer, hidden) = (layer(DType::BF16), hidden(DType::BF16));
    let options = CrossEntropyOptions {
        reduction: Reduction::Sum,
        ..CrossEntropyOptions::default()
    };
    let head = layer.tied_head();
    let loss = head
        .cross_entropy(hidden.clone(), labels(&[-100; 6]), options)
        .unwrap();
    assert_eq!(values(&loss), [0.0]);
    let gradients = backward(&loss).unwrap();
    assert_eq!(of_hidden(&hidden, &gradients), [0.0; 6 * DIM]);
    assert_eq!(of_rows(&layer, &gradients), [0.0; 3 * DIM]);
    let none = Tensor::<2>::zeros([0, DIM], (&device(), DType::BF16));
    let loss = head.cross_entropy(none, labels(&[]), options).unwrap();
    assert_eq!(of_rows(&layer, &backward(&loss).unwrap()), [0.0; 3 * DIM]);
}

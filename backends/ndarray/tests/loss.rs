//! The fused loss against the definition, in `f64`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use half::{bf16, f16};
use ndarray::{Array2, Axis, OwnedRepr};
use proptest::prelude::*;
use trainable_tokens_core::{
    BackendError, CrossEntropyOptions, CrossEntropyPlan, Element, ErrorKind, LogitsChunk, Overlap, Reduction,
    Softcap, TokenRows, TokenSet,
};
use trainable_tokens_ndarray::{LossBuffers, NdTable, TrainableTokens, TrainableTokensExt};

type Layer<T> = TrainableTokens<NdTable<OwnedRepr<T>>, T>;

#[derive(Clone, Debug)]
struct Case {
    v: usize,
    d: usize,
    tokens: Vec<u32>,
    labels: Vec<i64>,
    options: CrossEntropyOptions,
    seed: u32,
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (1usize..30, 0usize..7, any::<u16>(), 1usize..14);
    let settings = (prop::option::of(0.5f64..5.0), any::<bool>(), any::<bool>());
    (sizes, settings).prop_flat_map(|((v, d, seed, chunk), (softcap, mean, ignore))| {
        let all: Vec<u32> = (0..u32::try_from(v).unwrap()).collect();
        let tokens = proptest::sample::subsequence(all, 0..=v).prop_shuffle();
        let label = prop_oneof![4 => 0..i64::try_from(v).unwrap(), 1 => Just(-100)];
        let labels = proptest::collection::vec(label, 1..12);
        let options = CrossEntropyOptions {
            softcap: softcap.map(|softcap| Softcap::new(softcap).unwrap()),
            reduction: if mean { Reduction::Mean } else { Reduction::Sum },
            ignore_index: ignore.then_some(0),
            chunk: LogitsChunk::rows(chunk).unwrap(),
        };
        (tokens, labels).prop_map(move |(tokens, labels)| Case {
            v,
            d,
            tokens,
            labels,
            options,
            seed: u32::from(seed),
        })
    })
}

fn values<T: Element>(seed: u32, rows: usize, columns: usize) -> Array2<T> {
    let value = |i: usize| (f64::from(u32::try_from(i).unwrap() * 31 + seed) * 0.731).sin();
    let values = (0..rows * columns).map(|i| T::from_f64(value(i))).collect();
    Array2::from_shape_vec((rows, columns), values).unwrap()
}

fn rows(values: &Array2<f32>) -> TokenRows {
    TokenRows::new(values.iter().copied().collect(), values.nrows(), values.ncols()).unwrap()
}

/// A trained layer, and the table that it stands for.
fn trained<T: Element>(case: &Case) -> (Layer<T>, Array2<f64>) {
    let mut table = values::<T>(case.seed, case.v, case.d);
    let tokens = TokenSet::new(case.tokens.clone(), case.v).unwrap();
    let new = values::<f32>(case.seed ^ 0x77, case.tokens.len(), case.d);
    let layer = Layer::with_rows(NdTable::new(table.clone()).unwrap(), tokens, &rows(&new)).unwrap();
    for (row, id) in new.outer_iter().zip(&case.tokens) {
        table.row_mut(*id as usize).assign(&row.mapv(T::from_f32));
    }
    (layer, table.mapv(Element::to_f64))
}

/// The loss and the gradients of the hidden states and of the whole table.
fn dense(case: &Case, hidden: &Array2<f64>, table: &Array2<f64>) -> (f64, Array2<f64>, Array2<f64>) {
    let counts = |label: i64| label != -100 && case.options.ignore_index != Some(label);
    let count = case.labels.iter().filter(|label| counts(**label)).count();
    let factor = match case.options.reduction {
        Reduction::Mean => 1.0 / count as f64,
        Reduction::Sum => 1.0,
    };
    let (mut loss, mut upstream) = (0.0, hidden.dot(&table.t()));
    for (mut row, label) in upstream.outer_iter_mut().zip(&case.labels) {
        if !counts(*label) {
            row.fill(0.0);
            continue;
        }
        let label = usize::try_from(*label).unwrap();
        let softcap = case.options.softcap.map(Softcap::get);
        let capped = row.mapv(|x| softcap.map_or(x, |cap| cap * (x / cap).tanh()));
        let sum = capped.mapv(f64::exp).sum();
        loss += factor * (sum.ln() - capped[label]);
        for (at, x) in row.iter_mut().enumerate() {
            let slope = softcap.map_or(1.0, |cap| 1.0 - (capped[at] / cap).powi(2));
            let target = if at == label { 1.0 } else { 0.0 };
            *x = factor * slope * (capped[at].exp() / sum - target);
        }
    }
    (loss, upstream.dot(table), upstream.t().dot(hidden))
}

fn close(what: &str, got: impl IntoIterator<Item = f64>, want: &Array2<f64>, tolerance: f64) {
    let scale = want.iter().fold(1f64, |most, x| most.max(x.abs()));
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!(
            (got - want).abs() <= tolerance * scale,
            "{what}: {got}, expected {want}"
        );
    }
}

fn fused<T: Element>(case: &Case, tolerance: f64) {
    let (layer, table) = trained::<T>(case);
    let n = case.labels.len();
    let hidden = values::<T>(case.seed ^ 3, n, case.d);
    let got = layer.cross_entropy(hidden.view(), &case.labels, case.options);
    let counts = |label: &&i64| **label != -100 && case.options.ignore_index != Some(**label);
    if case.options.reduction == Reduction::Mean && !case.labels.iter().any(|label| counts(&label)) {
        assert_eq!(got.unwrap_err().kind(), ErrorKind::AllIgnored);
        return;
    }
    let got = got.unwrap();
    let (loss, of_hidden, of_table) = dense(case, &hidden.mapv(Element::to_f64), &table);
    let wide = if T::DTYPE.size_in_bytes() == 8 {
        1e-12
    } else {
        1e-5
    };
    assert!(
        (got.loss - loss).abs() <= wide * loss.abs().max(1.0),
        "{} {loss}",
        got.loss
    );
    close(
        "hidden",
        got.hidden.iter().map(|x| x.to_f64()),
        &of_hidden,
        tolerance,
    );
    let of_rows = layer.gradient(&got.rows);
    let ids: Vec<usize> = case.tokens.iter().map(|id| *id as usize).collect();
    let want = of_table.select(Axis(0), &ids);
    close("rows", of_rows.unwrap().to_f64_vec(), &want, wide);

    let alone = layer
        .linear_cross_entropy(hidden.clone(), &case.labels, case.options)
        .unwrap();
    let want = Array2::from_elem((1, 1), loss);
    close("loss alone", alone.iter().map(|x| x.to_f64()), &want, tolerance);

    // Twice into the same memory, with an upstream gradient: rows add up, those of hidden states do not.
    let plan = CrossEntropyPlan::new(&case.labels, case.v, case.options).unwrap();
    let mut rows = layer.zero_gradient();
    let (mut again, mut buffers) = (hidden.clone(), LossBuffers::default());
    for _ in 0..2 {
        let view = again.view_mut();
        let loss = layer.cross_entropy_into(&plan, hidden.view(), -2.5, view, &mut rows, &mut buffers);
        assert_eq!(loss.unwrap(), got.loss);
    }
    let want = of_hidden.mapv(|x| x * -2.5);
    close("hidden again", again.iter().map(|x| x.to_f64()), &want, tolerance);
    let want = of_table.select(Axis(0), &ids).mapv(|x| x * -5.0);
    close(
        "rows again",
        layer.gradient(&rows).unwrap().to_f64_vec(),
        &want,
        wide,
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn loss_and_gradients_are_those_of_the_definition(case in case()) {
        fused::<f64>(&case, 1e-12);
        fused::<f32>(&case, 1e-5);
        fused::<f16>(&case, 4e-3);
        fused::<bf16>(&case, 3e-2);
    }
}

fn fixed() -> Case {
    Case {
        v: 9,
        d: 3,
        tokens: vec![7, 2],
        labels: vec![2, -100, 8, 0],
        options: CrossEntropyOptions::default(),
        seed: 5,
    }
}

#[test]
fn buffers_serve_losses_of_any_size() {
    let mut buffers = LossBuffers::default();
    for (v, d, tokens, labels) in [
        (9, 3, vec![7, 2], vec![2, 8, -100, 0]),
        (4, 2, vec![3, 1, 0], vec![2, 3]),
        (30, 5, vec![], vec![2, 3, 29, 29, 4]),
        (9, 3, vec![7, 2], vec![2, 8, -100, 0]),
    ] {
        let case = Case {
            v,
            d,
            tokens,
            labels,
            ..fixed()
        };
        let (layer, _) = trained::<f32>(&case);
        let hidden = values::<f32>(3, case.labels.len(), d);
        let want = layer
            .cross_entropy(hidden.view(), &case.labels, case.options)
            .unwrap();
        let plan = CrossEntropyPlan::new(&case.labels, v, case.options).unwrap();
        let (mut got, mut rows) = (hidden.clone(), layer.zero_gradient());
        let loss = layer
            .cross_entropy_into(&plan, hidden.view(), 1.0, got.view_mut(), &mut rows, &mut buffers)
            .unwrap();
        assert_eq!((loss, got), (want.loss, want.hidden));
        if !case.tokens.is_empty() {
            assert_eq!(
                layer.gradient(&rows).unwrap(),
                layer.gradient(&want.rows).unwrap()
            );
        }
    }
}

#[test]
fn merged_disabled_and_several_adapters_count_as_for_the_logits() {
    let case = fixed();
    let (mut layer, table) = trained::<f64>(&case);
    let hidden = values::<f64>(3, 4, 3);
    let loss = |layer: &Layer<f64>| {
        layer
            .cross_entropy(hidden.view(), &case.labels, case.options)
            .unwrap()
    };
    let live = loss(&layer);
    layer.merge().unwrap();
    let merged = loss(&layer);
    assert_eq!((merged.loss, &merged.hidden), (live.loss, &live.hidden));
    assert!(
        layer.gradient(&merged.rows).is_err(),
        "merged rows have no gradient"
    );
    layer.unmerge().unwrap();
    layer.disable().unwrap();
    let base = layer.source().view().to_owned();
    let (want, _, _) = dense(&case, &hidden, &base);
    assert!((loss(&layer).loss - want).abs() < 1e-12);
    layer.enable();

    let other = TokenSet::new([2, 0], 9).unwrap();
    layer
        .add_adapter_with_rows("other", other, &rows(&values(8, 2, 3)))
        .unwrap();
    layer
        .activate_overlapping(&["default", "other"], Overlap::LastWins)
        .unwrap();
    let mut both = table;
    for (id, row) in [2, 0].into_iter().zip(values::<f32>(8, 2, 3).outer_iter()) {
        both.row_mut(id).assign(&row.mapv(f64::from));
    }
    let (want, _, of_table) = dense(&case, &hidden, &both);
    let got = loss(&layer);
    assert!((got.loss - want).abs() < 1e-12);
    let of = |name| {
        layer
            .adapter(name)
            .unwrap()
            .gradient(&got.rows)
            .unwrap()
            .to_f64_vec()
    };
    let (first, second) = (of("default"), of("other"));
    let want = of_table.select(Axis(0), &[7]);
    close("rows of the first", first[..3].to_vec(), &want, 1e-12);
    assert_eq!(first[3..], [0.0; 3], "shadowed");
    close(
        "rows of the second",
        second,
        &of_table.select(Axis(0), &[2, 0]),
        1e-12,
    );
}

#[test]
fn rows_that_do_not_count_change_nothing() {
    let case = fixed();
    let (layer, _) = trained::<f32>(&case);
    let mut hidden = values::<f32>(3, 4, 3);
    let want = layer
        .cross_entropy(hidden.view(), &case.labels, case.options)
        .unwrap();
    hidden.row_mut(1).fill(f32::NAN);
    let got = layer
        .cross_entropy(hidden.view(), &case.labels, case.options)
        .unwrap();
    assert_eq!((got.loss, got.hidden), (want.loss, want.hidden));
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = fixed();
    let (layer, _) = trained::<f32>(&case);
    let hidden = values::<f32>(3, 4, 3);
    let refused = |hidden: &Array2<f32>, labels: &[i64]| {
        let error = layer
            .cross_entropy(hidden.view(), labels, case.options)
            .unwrap_err();
        let other = layer.linear_cross_entropy(hidden.clone(), labels, case.options);
        assert_eq!(other.unwrap_err().to_string(), error.to_string());
        error
    };
    let error = refused(&hidden, &[2, -1, 3, 4]);
    assert!(error.to_string().contains("-1 at position 1"), "{error}");
    assert_eq!(refused(&hidden, &[-100; 4]).kind(), ErrorKind::AllIgnored);
    assert_eq!(refused(&hidden, &[1; 3]).kind(), ErrorKind::Shape);
    assert_eq!(refused(&values(3, 4, 2), &[1; 4]).kind(), ErrorKind::Shape);

    let plan = CrossEntropyPlan::new(&case.labels, 9, case.options).unwrap();
    let foreign = CrossEntropyPlan::new(&case.labels, 10, case.options).unwrap();
    let mut rows = layer.zero_gradient();
    for (plan, mut out) in [(plan, Array2::zeros((3, 3))), (foreign, Array2::zeros((4, 3)))] {
        let mut buffers = LossBuffers::default();
        let result =
            layer.cross_entropy_into(&plan, hidden.view(), 1.0, out.view_mut(), &mut rows, &mut buffers);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Shape);
    }
    assert!(
        layer
            .gradient(&rows)
            .unwrap()
            .to_f64_vec()
            .iter()
            .all(|x| *x == 0.0)
    );
}

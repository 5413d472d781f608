//! Properties that hold for every table, token set and batch; the oracle is the dense definition.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use half::{bf16, f16};
use ndarray::{Array2, Axis, OwnedRepr};
use proptest::prelude::*;
use trainable_tokens_core::{
    Adam, AdamConfig, DType, Element, EmbedScale, EmbeddingSource, HostTable, LayerOptions, Padding,
    PaddingRule, TokenId, TokenRows, TokenSet,
};
use trainable_tokens_ndarray::{NdTable, TrainableTokens, TrainableTokensExt};

type Table<T> = NdTable<OwnedRepr<T>>;
type Layer<T, O = T> = TrainableTokens<Table<T>, O>;

#[derive(Clone, Debug)]
struct Case {
    v: usize,
    d: usize,
    tokens: Vec<u32>,
    ids: Vec<u32>,
    seed: u64,
}

/// Tables from 1 x 1; token sets from none to all, in any order; batches from empty, with repeats and both edges.
fn case() -> impl Strategy<Value = Case> {
    (1usize..40, 1usize..9, any::<u64>()).prop_flat_map(|(v, d, seed)| {
        let all: Vec<u32> = (0..u32::try_from(v).unwrap()).collect();
        let last = all[v - 1];
        let tokens = prop_oneof![
            4 => proptest::sample::subsequence(all.clone(), 0..=v),
            1 => Just(Vec::new()),
            1 => Just(all),
        ]
        .prop_shuffle();
        let id = prop_oneof![4 => 0..=last, 1 => Just(0), 1 => Just(last)];
        (tokens, proptest::collection::vec(id, 0..40)).prop_map(move |(tokens, ids)| Case {
            v,
            d,
            tokens,
            ids,
            seed,
        })
    })
}

fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f64::from(u32::try_from(state >> 40).unwrap()) / f64::from(1u32 << 24) - 0.5
    };
    (0..len).map(|_| next()).collect()
}

fn values<T: Element>(seed: u64, rows: usize, columns: usize) -> Array2<T> {
    let values = noise(seed, rows * columns).into_iter().map(T::from_f64).collect();
    Array2::from_shape_vec((rows, columns), values).unwrap()
}

fn bits<T: Element>(array: &Array2<T>) -> Vec<u8> {
    TokenRows::new(array.iter().copied().collect(), array.nrows(), array.ncols())
        .unwrap()
        .to_le_bytes()
}

fn layer<T: Element, O: Element>(case: &Case) -> Layer<T, O> {
    let table = NdTable::new(values(case.seed, case.v, case.d)).unwrap();
    Layer::new(table, TokenSet::new(case.tokens.clone(), case.v).unwrap()).unwrap()
}

/// The layer with other rows than the base's, and the table that the rows define.
fn trained<T: Element, O: Element>(case: &Case) -> (Layer<T, O>, Array2<T>) {
    let mut layer = layer::<T, O>(case);
    let rows = values::<f32>(case.seed ^ 0x77, case.tokens.len(), case.d);
    layer
        .set_rows(&TokenRows::new(rows.iter().copied().collect(), rows.nrows(), case.d).unwrap())
        .unwrap();
    let mut dense = values::<T>(case.seed, case.v, case.d);
    for (slot, id) in case.tokens.iter().enumerate() {
        dense
            .row_mut(*id as usize)
            .assign(&rows.row(slot).mapv(T::from_f32));
    }
    (layer, dense)
}

fn select<T: Element>(table: &Array2<T>, ids: &[u32]) -> Array2<T> {
    table.select(Axis(0), &ids.iter().map(|id| *id as usize).collect::<Vec<_>>())
}

fn no_op<T: Element>(case: &Case) {
    let layer = layer::<T, T>(case);
    let base = values::<T>(case.seed, case.v, case.d);
    assert_eq!(
        bits(&layer.lookup(&case.ids).unwrap()),
        bits(&select(&base, &case.ids))
    );
    let hidden = values::<T>(case.seed ^ 3, 3, case.d);
    let frozen = Layer::<T, T>::new(NdTable::new(base).unwrap(), TokenSet::new([], case.v).unwrap()).unwrap();
    assert_eq!(
        bits(&layer.logits(hidden.clone()).unwrap()),
        bits(&frozen.logits(hidden).unwrap())
    );
}

fn replaced<T: Element>(case: &Case) {
    let (mut layer, dense) = trained::<T, T>(case);
    let before = bits(&layer.source().view().to_owned());
    let want = bits(&select(&dense, &case.ids));
    assert_eq!(bits(&layer.lookup(&case.ids).unwrap()), want);
    let hidden = values::<T>(case.seed ^ 3, 3, case.d);
    let logits = bits(&layer.logits(hidden.clone()).unwrap());
    layer.merge().unwrap();
    assert_eq!(
        bits(&layer.source().view().to_owned()),
        bits(&dense),
        "merging writes the rows and no other"
    );
    assert_eq!(
        bits(&layer.lookup(&case.ids).unwrap()),
        want,
        "merged and unmerged agree"
    );
    assert_eq!(
        bits(&layer.logits(hidden).unwrap()),
        logits,
        "merged and unmerged heads agree"
    );
    assert!(layer.merge().is_err());
    layer.unmerge().unwrap();
    assert_eq!(bits(&layer.source().view().to_owned()), before);
    assert!(layer.unmerge().is_err());
}

fn gradients<T: Element>(case: &Case) {
    let (layer, dense) = trained::<T, f64>(case);
    let dense = dense.mapv(Element::to_f64);
    let mut want = Array2::<f64>::zeros(dense.dim());
    // Lookup: the dense gradient, of which the chosen rows must come back.
    let upstream = values::<f64>(case.seed ^ 5, case.ids.len(), case.d);
    for (id, row) in case.ids.iter().zip(upstream.outer_iter()) {
        let mut sum = want.row_mut(*id as usize);
        sum += &row;
    }
    let plan = layer.plan(&case.ids).unwrap();
    let mut gradient = layer.backward(&plan, upstream.view()).unwrap();
    close(&layer.gradient(&gradient).unwrap(), &select(&want, &case.tokens));
    // The head adds to it.
    let hidden = values::<f64>(case.seed ^ 9, 3, case.d);
    let upstream = values::<f64>(case.seed ^ 6, 3, case.v);
    want += &upstream.t().dot(&hidden);
    let hidden_gradient = layer
        .logits_backward(hidden.view(), upstream.view(), &mut gradient)
        .unwrap();
    close(&layer.gradient(&gradient).unwrap(), &select(&want, &case.tokens));
    let hidden_gradient = TokenRows::new(hidden_gradient.iter().copied().collect(), 3, case.d).unwrap();
    close(&hidden_gradient, &upstream.dot(&dense));
}

fn close(got: &TokenRows, want: &Array2<f64>) {
    assert_eq!(got.shape(), *want.shape());
    for (got, want) in got.to_f64_vec().into_iter().zip(want) {
        assert!((got - want).abs() <= 1e-12 * (1.0 + want.abs()), "{got} {want}");
    }
}

fn training<T: Element>(case: &Case) {
    let mut layer = layer::<T, T>(case);
    let before = bits(&layer.source().view().to_owned());
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.1,
        weight_decay: 0.1,
        ..AdamConfig::ADAMW
    })
    .unwrap();
    for step in 0..3 {
        let plan = layer.plan(&case.ids).unwrap();
        let upstream = values::<T>(case.seed ^ step, case.ids.len(), case.d);
        let gradient = layer.backward(&plan, upstream.view()).unwrap();
        layer.step(&gradient, &mut optimizer, &mut []).unwrap();
    }
    assert_eq!(
        bits(&layer.source().view().to_owned()),
        before,
        "training writes no base row"
    );
    let rows = layer.rows().unwrap().to_dtype(T::DTYPE);
    layer.merge().unwrap();
    let base = values::<T>(case.seed, case.v, case.d);
    for id in 0..case.v {
        let row = layer
            .source()
            .read_rows(&[TokenId(u32::try_from(id).unwrap())])
            .unwrap()
            .to_le_bytes();
        let want = match case.tokens.iter().position(|token| *token as usize == id) {
            Some(slot) => rows.to_le_bytes()[slot * row.len()..][..row.len()].to_vec(),
            None => bits(&base.row(id).to_owned().insert_axis(Axis(0))),
        };
        assert_eq!(row, want, "row {id}");
    }
}

/// Padding and scale against their definitions.
fn options(case: &Case, padding: u32, rule: PaddingRule) {
    let padding = TokenId(padding % u32::try_from(case.v).unwrap());
    let (layer, dense) = trained::<bf16, f32>(case);
    let scale = Some(EmbedScale::TableDType(5.656_854));
    let layer = layer.with_options(LayerOptions {
        padding: Some(Padding { token: padding, rule }),
        scale,
        ..LayerOptions::default()
    });
    let factor = bf16::from_f32(5.656_854).to_f32();
    let want = select(&dense, &case.ids).mapv(|x| x.to_f32() * factor);
    assert_eq!(layer.lookup(&case.ids).unwrap(), want);

    let plan = layer.plan(&case.ids).unwrap();
    let gradient = layer
        .backward(&plan, Array2::ones((case.ids.len(), case.d)).view())
        .unwrap();
    let gradient = layer.gradient(&gradient).unwrap();
    for (slot, token) in case.tokens.iter().enumerate() {
        let count = case.ids.iter().filter(|id| *id == token).count();
        let dropped = TokenId(*token) == padding && rule == PaddingRule::NoLookupGradient;
        let mut want = 0f32;
        (0..if dropped { 0 } else { count }).for_each(|_| want += factor);
        let row = &gradient.as_slice::<f32>().unwrap()[slot * case.d..][..case.d];
        assert!(
            row.iter().all(|x| x.to_bits() == want.to_bits()),
            "{row:?} {want}"
        );
    }
}

macro_rules! for_every_dtype {
    ($($property:ident)*) => { proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        $(#[test] fn $property(case in case()) {
            super::$property::<f64>(&case);
            super::$property::<f32>(&case);
            super::$property::<f16>(&case);
            super::$property::<bf16>(&case);
        })*
        #[test] fn options(case in case(), padding: u32, train: bool) {
            let rule = if train { PaddingRule::Train } else { PaddingRule::NoLookupGradient };
            super::options(&case, padding, rule);
        }
    } };
}

mod every_dtype {
    use super::*;
    for_every_dtype! { no_op replaced gradients training }
}

#[test]
fn a_table_that_is_not_row_major_is_refused() {
    let table = Array2::<f32>::zeros((3, 4));
    assert!(NdTable::new(table.t()).is_err());
    assert!(NdTable::new(table.view()).is_ok());
}

#[test]
fn wrong_shapes_are_refused() {
    let case = Case {
        v: 5,
        d: 2,
        tokens: vec![3, 1],
        ids: vec![],
        seed: 1,
    };
    let layer = layer::<f32, f32>(&case);
    let plan = layer.plan(&[3, 0, 1]).unwrap();
    assert!(layer.backward(&plan, Array2::zeros((3, 3)).view()).is_err());
    assert!(layer.backward(&plan, Array2::zeros((2, 2)).view()).is_err());
    assert!(
        layer
            .lookup_into(&plan, Array2::zeros((3, 1)).view_mut())
            .is_err()
    );
    assert!(layer.logits(Array2::zeros((1, 3))).is_err());
    assert!(layer.source().row(TokenId(5)).is_none());
    let other = TokenSet::new([1], 6).unwrap();
    assert!(Layer::<f32>::new(NdTable::new(values(1, 5, 2)).unwrap(), other).is_err());
    let rows = TokenRows::zeros(DType::F32, 1, 2);
    let tokens = TokenSet::new([1, 2], 5).unwrap();
    assert!(Layer::<f32>::with_rows(NdTable::new(values(1, 5, 2)).unwrap(), tokens, &rows).is_err());
}

#[test]
fn strided_output_is_written_too() {
    let case = Case {
        v: 5,
        d: 2,
        tokens: vec![3, 1],
        ids: vec![3, 0, 1],
        seed: 1,
    };
    let (layer, dense) = trained::<f32, f32>(&case);
    let mut out = Array2::zeros((2, 3));
    layer
        .lookup_into(&layer.plan(&case.ids).unwrap(), out.view_mut().reversed_axes())
        .unwrap();
    assert_eq!(out.t(), select(&dense, &case.ids));
}

//! Several adapters of one layer, and the head that follows them.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, Optimizer};
use common::{DTYPES, assert_close, bytes, noise, tolerance, values};
use trainable_tokens_candle::{Candle, Error, TrainableTokens};
use trainable_tokens_core::{
    Backend, BackendError, DType as CoreDType, DeltaStore, ErrorKind, MergeCheck, OptimizerHook, Overlap,
    RowMix, Sgd, SgdConfig, StepContext, TokenRows,
};

const VOCAB: usize = 10;
const DIM: usize = 4;

fn rows(num_rows: usize, seed: usize) -> TokenRows {
    let values = values(&noise(&[num_rows, DIM], DType::F64, seed));
    TokenRows::new(values, num_rows, DIM).unwrap()
}

/// Three adapters of which `a` and `b` are disjoint and `c` shares a token with each of them. Their rows are of different
/// element types.
fn layer(dtype: DType) -> TrainableTokens {
    let mut layer = TrainableTokens::frozen(noise(&[VOCAB, DIM], dtype, 1)).unwrap();
    let adapters: [(_, &[u32], _); 3] = [
        ("a", &[7, 2], CoreDType::F32),
        ("b", &[5], CoreDType::BF16),
        ("c", &[2, 0, 5], CoreDType::F64),
    ];
    for (seed, (name, tokens, dtype)) in adapters.into_iter().enumerate() {
        let rows = rows(tokens.len(), seed + 20).to_dtype(dtype);
        layer.add_adapter_with_rows(name, tokens, &rows).unwrap();
    }
    layer
}

fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn every_id() -> Tensor {
    ids(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 2])
}

/// The table with each of `(adapter, row, token)` written into it in that order, rounded to its type.
fn written(layer: &TrainableTokens, dtype: DType, entries: &[(&str, usize, usize)]) -> Tensor {
    let table = noise(&[VOCAB, DIM], dtype, 1).copy().unwrap();
    for (name, row, token) in entries {
        let adapter = layer.adapter(name).unwrap();
        let row = adapter.delta().tensor().detach().narrow(0, *row, 1).unwrap();
        table.slice_set(&row.to_dtype(dtype).unwrap(), 0, *token).unwrap();
    }
    table
}

/// Lookup and head are those of `table`.
fn expect_outputs(what: &str, layer: &TrainableTokens, table: &Tensor) {
    let want = table.index_select(&every_id(), 0).unwrap();
    assert_eq!(
        bytes(&layer.forward(&every_id()).unwrap()),
        bytes(&want),
        "{what}"
    );
    let hidden = noise(&[3, DIM], table.dtype(), 3);
    let got = layer.tied_head().forward(&hidden).unwrap();
    let want = hidden.matmul(&table.t().unwrap()).unwrap();
    assert_close(what, &values(&got), &values(&want), tolerance(table.dtype()));
}

#[test]
fn disjoint_adapters_are_active_together() {
    for dtype in DTYPES {
        let mut layer = layer(dtype);
        assert_eq!(layer.adapter_names(), ["a", "b", "c"]);
        expect_outputs("none", &layer, &noise(&[VOCAB, DIM], dtype, 1));
        let all = [("a", 0, 7), ("a", 1, 2), ("b", 0, 5)];
        for names in [&["a", "b"][..], &["b", "a"]] {
            layer.activate(names).unwrap();
            assert_eq!(layer.active_names(), names);
            expect_outputs("a and b", &layer, &written(&layer, dtype, &all));
        }
        layer.activate(&["b"]).unwrap();
        expect_outputs("b", &layer, &written(&layer, dtype, &all[2..]));
        layer.activate(&[]).unwrap();
        expect_outputs("none", &layer, &noise(&[VOCAB, DIM], dtype, 1));
    }
}

#[test]
fn shared_tokens_are_refused_or_the_last_wins() {
    for dtype in DTYPES {
        let mut layer = layer(dtype);
        layer.activate(&["b"]).unwrap();
        let error = layer.activate(&["a", "c"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overlap);
        assert!(error.to_string().contains("token id 2 "), "{error}");
        assert_eq!(layer.active_names(), ["b"], "a refused call changes nothing");
        let (a, b) = ([("a", 0, 7), ("a", 1, 2)], [("b", 0, 5)]);
        let c = [("c", 0, 2), ("c", 1, 0), ("c", 2, 5)];
        for (names, order) in [
            (["a", "b", "c"], [&a[..], &b, &c]),
            (["c", "b", "a"], [&c[..], &b, &a]),
        ] {
            layer.activate_overlapping(&names, Overlap::LastWins).unwrap();
            expect_outputs("last wins", &layer, &written(&layer, dtype, &order.concat()));
        }
    }
}

#[test]
fn shared_tokens_get_the_weighted_mean() {
    let mut layer = layer(DType::F64);
    let weights = Overlap::WeightedMean(vec![3.0, 1.0, 0.5]);
    layer.activate_overlapping(&["a", "b", "c"], weights).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| layer.adapter(name).unwrap().rows().unwrap().to_f64_vec());
    let table = written(&layer, DType::F64, &[("a", 0, 7), ("c", 1, 0)]);
    let mean = |token: usize, first: (f64, &[f64]), second: (f64, &[f64])| {
        let sum = first.0 + second.0;
        let rows = first.1.iter().zip(second.1);
        let row = rows.map(|(x, y)| first.0 / sum * x + second.0 / sum * y);
        let row = Tensor::from_vec(row.collect::<Vec<_>>(), (1, DIM), &Device::Cpu);
        table.slice_set(&row.unwrap(), 0, token).unwrap();
    };
    mean(2, (3.0, &a[DIM..]), (0.5, &c[..DIM]));
    mean(5, (1.0, &b), (0.5, &c[2 * DIM..]));
    let got = layer.forward(&every_id()).unwrap();
    let want = table.index_select(&every_id(), 0).unwrap();
    assert_close("mean", &values(&got), &values(&want), 1e-15);
    let hidden = noise(&[3, DIM], DType::F64, 3);
    let got = layer.tied_head().forward(&hidden).unwrap();
    assert_close(
        "head",
        &values(&got),
        &values(&hidden.matmul(&table.t().unwrap()).unwrap()),
        1e-14,
    );
}

/// Ways in which the three adapters can be active.
fn every_overlap() -> [(&'static [&'static str], Overlap); 5] {
    [
        (&["a", "b"], Overlap::Refuse),
        (&["a", "c"], Overlap::LastWins),
        (&["c", "b", "a"], Overlap::LastWins),
        (&["a", "b", "c"], Overlap::WeightedMean(vec![3.0, 1.0, 0.5])),
        (&["c", "a", "b"], Overlap::WeightedMean(vec![0.1, 0.7, 1e300])),
    ]
}

#[test]
fn a_combination_has_the_bits_of_the_host() {
    for dtypes in DTYPES
        .iter()
        .flat_map(|first| DTYPES.map(|second| [*first, second]))
    {
        let [first, second] = dtypes.map(|dtype| match dtype {
            DType::F64 => CoreDType::F64,
            DType::F32 => CoreDType::F32,
            DType::F16 => CoreDType::F16,
            _ => CoreDType::BF16,
        });
        let mut layer = TrainableTokens::frozen(noise(&[VOCAB, DIM], DType::F64, 1)).unwrap();
        let adapters: [(_, &[u32], _); 4] = [
            ("a", &[7, 2], first),
            ("b", &[5], second),
            ("c", &[2, 0, 5], first),
            ("none", &[], second),
        ];
        for (seed, (name, tokens, dtype)) in adapters.into_iter().enumerate() {
            let rows = rows(tokens.len(), seed).to_dtype(dtype);
            layer.add_adapter_with_rows(name, tokens, &rows).unwrap();
        }
        for (names, overlap) in every_overlap() {
            let names = [names, &["none"]].concat();
            let overlap = match overlap {
                Overlap::WeightedMean(weights) => Overlap::WeightedMean([weights, vec![1.0]].concat()),
                other => other,
            };
            layer.activate_overlapping(&names, overlap.clone()).unwrap();
            let live = layer.layer().active().unwrap().unwrap().read().unwrap();
            let tokens = layer.tokens().to_vec();
            // Core merges by the mix on the host; the table's type holds all of the rows exactly.
            layer.merge().unwrap();
            let table = layer.table().tensor().clone();
            let merged = table.index_select(&ids(&tokens), 0).unwrap();
            assert_eq!(
                live.to_dtype(CoreDType::F64).to_le_bytes(),
                bytes(&merged),
                "{names:?} {overlap:?}"
            );
            layer.unmerge().unwrap();
        }
    }
}

/// The gradient of a loss over lookup and head for each adapter's rows, by the dense definition: in `f64`, over a table of
/// which each row is what `overlap` makes of the adapters' rows.
fn dense(layer: &TrainableTokens, names: &[&str], overlap: &Overlap) -> Vec<Vec<f64>> {
    let mut leaves = Vec::new();
    let mut terms: Vec<Vec<(usize, usize)>> = vec![Vec::new(); VOCAB];
    for (at, name) in names.iter().enumerate() {
        let adapter = layer.adapter(name).unwrap();
        let wide = adapter.delta().tensor().detach().to_dtype(DType::F64).unwrap();
        leaves.push(Var::from_tensor(&wide).unwrap());
        for (slot, id) in adapter.tokens().ids().iter().enumerate() {
            let terms = &mut terms[id.row()];
            if *overlap == Overlap::LastWins {
                terms.clear();
            }
            terms.push((at, slot));
        }
    }
    let base = layer.table().tensor().to_dtype(DType::F64).unwrap();
    let mut rows = Vec::new();
    for (token, terms) in terms.iter().enumerate() {
        let weight = |at: usize| match overlap {
            Overlap::WeightedMean(weights) => weights[at],
            _ => 1.0,
        };
        let largest = terms.iter().map(|(at, _)| weight(*at)).fold(0.0, f64::max);
        let sum: f64 = terms.iter().map(|(at, _)| weight(*at) / largest).sum();
        let mut row: Option<Tensor> = None;
        for (at, slot) in terms {
            let share = weight(*at) / largest / sum;
            let term = (leaves[*at].narrow(0, *slot, 1).unwrap() * share).unwrap();
            row = Some(row.map_or_else(|| term.clone(), |row| (row + &term).unwrap()));
        }
        rows.push(row.unwrap_or_else(|| base.narrow(0, token, 1).unwrap()));
    }
    let table = Tensor::cat(&rows, 0).unwrap();
    let dtype = layer.table().tensor().dtype();
    let [upstream, hidden, of_logits] = pass(dtype).map(|t| t.to_dtype(DType::F64).unwrap());
    let lookup = (table.index_select(&every_id(), 0).unwrap() * upstream).unwrap();
    let logits = (hidden.matmul(&table.t().unwrap()).unwrap() * of_logits).unwrap();
    let loss = (lookup.sum_all().unwrap() + logits.sum_all().unwrap()).unwrap();
    let gradients = loss.backward().unwrap();
    let of = |leaf: &Var| match gradients.get(leaf) {
        Some(gradient) => values(gradient),
        None => vec![0.0; leaf.elem_count()],
    };
    leaves.iter().map(of).collect()
}

/// The gradient of a lookup of `every_id`, hidden states, and the gradient of their logits.
fn pass(dtype: DType) -> [Tensor; 3] {
    [
        noise(&[12, DIM], dtype, 4),
        noise(&[3, DIM], dtype, 5),
        noise(&[3, VOCAB], dtype, 6),
    ]
}

#[test]
fn every_adapter_gets_the_dense_gradient_in_its_own_type() {
    for dtype in [DType::F64, DType::F32] {
        for (names, overlap) in every_overlap() {
            let mut layer = layer(dtype);
            layer.activate_overlapping(names, overlap.clone()).unwrap();
            let [upstream, hidden, of_logits] = pass(dtype);
            let lookup = (layer.forward(&every_id()).unwrap() * upstream).unwrap();
            let logits = (layer.tied_head().forward(&hidden).unwrap() * of_logits).unwrap();
            let loss = (lookup.sum_all().unwrap() + logits.sum_all().unwrap()).unwrap();
            let gradients = loss.backward().unwrap();
            for (name, want) in names.iter().zip(dense(&layer, names, &overlap)) {
                let adapter = layer.adapter(name).unwrap();
                let got = adapter.gradient(&gradients).unwrap();
                assert_eq!(got.dtype(), adapter.delta().dtype());
                let narrowest = match got.dtype() {
                    CoreDType::F64 if dtype == DType::F64 => 1e-12,
                    CoreDType::BF16 => 8e-3,
                    _ => 2e-6,
                };
                let what = format!("{name} of {names:?}, {overlap:?}");
                assert_close(&what, &got.to_f64_vec(), &want, narrowest);
            }
            let idle = layer
                .adapter_names()
                .into_iter()
                .find(|name| !names.contains(&&**name));
            if let Some(idle) = idle {
                let error = layer.adapter(&idle).unwrap().gradient(&gradients).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoGradient);
            }
        }
    }
}

#[test]
fn the_layers_own_rows_are_those_of_one_active_adapter() {
    let mut layer = layer(DType::F32);
    for names in [&[][..], &["a", "b"]] {
        layer.activate(names).unwrap();
        assert_eq!(layer.rows().unwrap_err().kind(), ErrorKind::State);
        assert_eq!(layer.var().unwrap_err().kind(), ErrorKind::State);
        assert_eq!(layer.set_rows(&rows(2, 1)).unwrap_err().kind(), ErrorKind::State);
    }
    layer.activate(&["b"]).unwrap();
    let one = layer.adapter("b").unwrap().rows().unwrap();
    assert!(layer.rows().unwrap().bits_eq(&one));
    assert_eq!(layer.adapter("d").err().unwrap().kind(), ErrorKind::Adapter);
    assert_eq!(layer.adapter_mut("d").unwrap_err().kind(), ErrorKind::Adapter);
}

#[test]
fn a_combination_is_never_written() {
    let mut layer = layer(DType::F32);
    layer.activate(&["a", "b"]).unwrap();
    let before = bytes(&layer.forward(&every_id()).unwrap());
    let lent = layer.layer();
    let mut both = lent.active().unwrap().unwrap().clone();
    assert!(matches!(both.write(&rows(3, 1)), Err(Error::Combination)));
    let error = both.update(&mut |_| Ok(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(matches!(both.var(), Err(Error::Combination)));
    let gradients = both.tensor().sum_all().unwrap().backward().unwrap();
    assert!(Candle::gradient(&gradients, &both).unwrap().is_none());
    assert_eq!(bytes(&layer.forward(&every_id()).unwrap()), before);
    let parts = [lent.adapter("a").unwrap().delta()];
    let error = Candle::combine(&parts, &RowMix::stack(vec![3]).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

/// Uses the head of the layer that is stepped, as a hook that logs may.
struct UsesTheHead(trainable_tokens_candle::TiedHead, usize);

impl OptimizerHook for UsesTheHead {
    fn before_step(&mut self, _: &mut StepContext<'_>) -> trainable_tokens_core::Result<()> {
        self.0.forward(&noise(&[1, DIM], DType::F32, 1)).unwrap();
        self.1 += 1;
        Ok(())
    }
}

#[test]
fn a_step_of_one_adapter_leaves_the_other_alone() {
    let mut layer = layer(DType::F32);
    layer.activate(&["a", "b"]).unwrap();
    let before = layer.adapter("b").unwrap().rows().unwrap();
    let loss = |layer: &TrainableTokens| {
        let out = layer.forward(&every_id()).unwrap();
        layer
            .tied_head()
            .forward(&out)
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap()
    };
    let start = loss(&layer).to_scalar::<f32>().unwrap();
    let var = layer.adapter("a").unwrap().delta().var().unwrap().clone();
    let mut adamw = candle_nn::AdamW::new_lr(vec![var], 0.05).unwrap();
    adamw.backward_step(&loss(&layer)).unwrap();
    let after_adamw = loss(&layer).to_scalar::<f32>().unwrap();
    assert!(after_adamw < start);

    let config = SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(config).unwrap();
    let gradients = loss(&layer).backward().unwrap();
    let mut hook = UsesTheHead(layer.tied_head(), 0);
    let step = layer
        .adapter_mut("a")
        .unwrap()
        .step(&gradients, &mut sgd, &mut [&mut hook]);
    step.unwrap();
    assert_eq!(hook.1, 1);
    assert!(loss(&layer).to_scalar::<f32>().unwrap() < after_adamw);
    assert!(layer.adapter("b").unwrap().rows().unwrap().bits_eq(&before));
}

#[test]
fn a_head_follows_its_layer_at_every_moment() {
    let mut layer = layer(DType::F32);
    let head = layer.tied_head();
    let hidden = noise(&[3, DIM], DType::F32, 3);
    let logits = || values(&head.forward(&hidden).unwrap());
    let of = |table: &Tensor| values(&hidden.matmul(&table.t().unwrap()).unwrap());
    let close = |what: &str, table: &Tensor| assert_close(what, &logits(), &of(table), 1e-6);
    let base = noise(&[VOCAB, DIM], DType::F32, 1);
    close("no adapter", &base);
    layer.activate(&["a"]).unwrap();
    close("a", &written(&layer, DType::F32, &[("a", 0, 7), ("a", 1, 2)]));
    layer.add_adapter_with_rows("d", &[9], &rows(1, 9)).unwrap();
    layer.activate(&["d"]).unwrap();
    close("added later", &written(&layer, DType::F32, &[("d", 0, 9)]));
    layer.set_rows(&rows(1, 10)).unwrap();
    let with_d = written(&layer, DType::F32, &[("d", 0, 9)]);
    close("rewritten", &with_d);
    layer.disable().unwrap();
    assert!(!layer.is_enabled());
    close("disabled", &base);
    layer.enable();
    close("enabled", &with_d);
    layer.merge_checked(MergeCheck::Finite).unwrap();
    assert_eq!(layer.disable().unwrap_err().kind(), ErrorKind::State);
    close("merged", &with_d);
    layer.activate(&["a"]).unwrap();
    close(
        "above a merge",
        &written(&layer, DType::F32, &[("d", 0, 9), ("a", 0, 7), ("a", 1, 2)]),
    );
    layer.unmerge().unwrap();
    assert_eq!(layer.delete_adapter("a").unwrap_err().kind(), ErrorKind::State);
    let deleted = layer.delete_adapter("d").unwrap();
    assert_eq!(deleted.tokens().to_vec(), [9]);
    close(
        "deleted",
        &written(&layer, DType::F32, &[("a", 0, 7), ("a", 1, 2)]),
    );
}

#[test]
fn merges_are_undone_in_reverse_order() {
    for dtype in DTYPES {
        let mut layer = layer(dtype);
        let table = layer.table().tensor().clone();
        let before = bytes(&table);
        layer.activate(&["a", "b"]).unwrap();
        let live = bytes(&layer.forward(&every_id()).unwrap());
        layer.merge().unwrap();
        let both = bytes(&table);
        assert_eq!(
            both,
            bytes(&written(&layer, dtype, &[("a", 0, 7), ("a", 1, 2), ("b", 0, 5)]))
        );
        assert_eq!(bytes(&layer.forward(&every_id()).unwrap()), live);
        let error = layer
            .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Finite)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overlap);
        layer
            .merge_adapters(&["c"], &Overlap::LastWins, MergeCheck::Finite)
            .unwrap();
        assert_eq!(layer.merges(), [&["a", "b"][..], &["c"]]);
        assert!(bytes(&table) != both);
        layer.unmerge().unwrap();
        assert_eq!(bytes(&table), both);
        layer.unmerge().unwrap();
        assert_eq!(bytes(&table), before);
        assert!(!layer.is_merged());
        assert_eq!(layer.unmerge().unwrap_err().kind(), ErrorKind::State);
    }
}

#[test]
fn a_row_that_is_not_finite_is_not_merged() {
    let mut layer = layer(DType::BF16);
    layer.activate(&["a"]).unwrap();
    let mut bad = rows(2, 1).to_f64_vec();
    bad[DIM + 1] = 3.4e38;
    layer.set_rows(&TokenRows::new(bad, 2, DIM).unwrap()).unwrap();
    let before = bytes(layer.table().tensor());
    let error = layer.merge_checked(MergeCheck::Finite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    assert!(error.to_string().contains("token id 2 "), "{error}");
    assert_eq!(bytes(layer.table().tensor()), before);
    assert!(!layer.is_merged());
}

const MIXED: [Option<&str>; 4] = [Some("a"), None, Some("c"), Some("a")];

fn mixed_ids() -> Tensor {
    Tensor::new(&[[7i64, 2, 5], [7, 2, 0], [5, 2, 1], [0, 9, 2]], &Device::Cpu).unwrap()
}

#[test]
fn a_mixed_batch_is_its_examples_one_by_one() {
    for dtype in DTYPES {
        let mut layer = layer(dtype);
        let (head, ids) = (layer.tied_head(), mixed_ids());
        let hidden = noise(&[4, 3, DIM], dtype, 3);
        let bias = noise(&[VOCAB], dtype, 8);
        let out = layer.lookup_mixed(&ids, &MIXED).unwrap();
        assert_eq!(out.dims(), [4, 3, DIM]);
        let logits = head.logits_mixed(&hidden, &MIXED).unwrap();
        assert_eq!(logits.dims(), [4, 3, VOCAB]);
        let biased = head.clone().with_bias(&bias).unwrap();
        let got = biased.logits_mixed(&hidden, &MIXED).unwrap();
        assert_eq!(bytes(&got), bytes(&logits.broadcast_add(&bias).unwrap()));
        for (example, name) in MIXED.iter().enumerate() {
            layer.activate(name.as_slice()).unwrap();
            let one = |t: &Tensor| t.narrow(0, example, 1).unwrap();
            let want = layer.forward(&one(&ids)).unwrap();
            assert_eq!(bytes(&one(&out)), bytes(&want), "{name:?}");
            let want = head.forward(&one(&hidden)).unwrap();
            assert_eq!(bytes(&one(&logits)), bytes(&want), "{name:?}");
        }
    }
}

#[test]
fn gradients_of_a_mixed_batch_are_those_of_its_examples() {
    let mut layer = layer(DType::F64);
    let (head, ids) = (layer.tied_head(), mixed_ids());
    let hidden = Var::from_tensor(&noise(&[4, 3, DIM], DType::F64, 3)).unwrap();
    let [of_rows, of_logits] = [(DIM, 4), (VOCAB, 5)].map(|(d, seed)| noise(&[4, 3, d], DType::F64, seed));
    let bias = noise(&[VOCAB], DType::F64, 8);
    let head = head.with_bias(&bias).unwrap();
    let sum = |out: Tensor, upstream: &Tensor| (out * upstream).unwrap().sum_all().unwrap();
    let lookup = sum(layer.lookup_mixed(&ids, &MIXED).unwrap(), &of_rows);
    let logits = sum(head.logits_mixed(&hidden, &MIXED).unwrap(), &of_logits);
    let mixed = (lookup + logits).unwrap().backward().unwrap();
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
    for (example, name) in MIXED.iter().enumerate() {
        layer.activate(name.as_slice()).unwrap();
        let one = |t: &Tensor| t.narrow(0, example, 1).unwrap();
        let lookup = sum(layer.forward(&one(&ids)).unwrap(), &one(&of_rows));
        let logits = sum(head.forward(&one(&hidden)).unwrap(), &one(&of_logits));
        loss = ((loss + lookup).unwrap() + logits).unwrap();
    }
    let alone = loss.backward().unwrap();
    // Each leaf sums in its own type.
    for (name, tolerance) in [("a", 2e-7), ("c", 1e-12)] {
        let adapter = layer.adapter(name).unwrap();
        let [got, want] = [&mixed, &alone].map(|gradients| adapter.gradient(gradients).unwrap().to_f64_vec());
        assert_close(name, &got, &want, tolerance);
        assert!(want.iter().any(|x| *x != 0.0));
    }
    let [got, want] = [&mixed, &alone].map(|gradients| values(gradients.get(&hidden).unwrap()));
    assert_close("hidden", &got, &want, 1e-12);
    let error = layer.adapter("b").unwrap().gradient(&mixed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);
}

#[test]
fn mixed_batches_that_make_no_sense_are_refused() {
    let mut layer = layer(DType::F32);
    let (head, ids) = (layer.tied_head(), mixed_ids());
    let hidden = noise(&[4, 3, DIM], DType::F32, 3);
    let both = |layer: &TrainableTokens, names: &[Option<&str>]| {
        let lookup = layer.lookup_mixed(&ids, names).unwrap_err().kind();
        assert_eq!(head.logits_mixed(&hidden, names).unwrap_err().kind(), lookup);
        lookup
    };
    // Two names would divide the twelve ids too, but not by examples.
    assert_eq!(both(&layer, &MIXED[..2]), ErrorKind::Shape);
    assert_eq!(both(&layer, &[]), ErrorKind::Shape);
    assert_eq!(both(&layer, &[None, Some("d"), None, None]), ErrorKind::Adapter);
    let scalar = Tensor::new(1u32, &Device::Cpu).unwrap();
    assert_eq!(
        layer.lookup_mixed(&scalar, &[None]).unwrap_err().kind(),
        ErrorKind::Shape
    );
    for hidden in [
        noise(&[], DType::F32, 1),
        noise(&[4], DType::F32, 1),
        noise(&[1, 5], DType::F32, 1),
    ] {
        assert_eq!(
            head.logits_mixed(&hidden, &[None]).unwrap_err().kind(),
            ErrorKind::Shape
        );
    }
    layer.activate(&["a"]).unwrap();
    layer.disable().unwrap();
    assert_eq!(both(&layer, &MIXED), ErrorKind::State);
    layer.enable();
    layer.merge().unwrap();
    assert_eq!(both(&layer, &MIXED), ErrorKind::State);
}

#[test]
fn empty_mixed_batches_are_empty() {
    let layer = layer(DType::F32);
    let head = layer.tied_head();
    for shape in [[0, 3], [4, 0]] {
        let ids = Tensor::zeros(&shape[..], DType::I64, &Device::Cpu).unwrap();
        let names = &MIXED[..shape[0]];
        let out = layer.lookup_mixed(&ids, names).unwrap();
        assert_eq!(out.dims(), [shape[0], shape[1], DIM]);
        assert_eq!(
            head.logits_mixed(&out, names).unwrap().dims(),
            [shape[0], shape[1], VOCAB]
        );
    }
}

#[test]
fn an_adapter_of_the_bases_own_rows_is_a_no_op() {
    for dtype in DTYPES {
        let table = noise(&[VOCAB, DIM], dtype, 1);
        let mut layer = TrainableTokens::from_tensor(table.clone(), &[7, 2]).unwrap();
        layer.add_adapter("more", &[1, 9]).unwrap();
        layer.activate(&["default", "more"]).unwrap();
        expect_outputs("no-op", &layer, &table);
        let hidden = noise(&[3, DIM], dtype, 3);
        let logits = layer.tied_head().forward(&hidden).unwrap();
        assert_eq!(
            bytes(&logits),
            bytes(&hidden.matmul(&table.t().unwrap()).unwrap())
        );
        let names = [None, Some("more"), Some("default")];
        let ids = Tensor::new(&[[7u32, 9], [7, 9], [7, 9]], &Device::Cpu).unwrap();
        let got = layer.lookup_mixed(&ids, &names).unwrap();
        let want = table.index_select(&ids.flatten_all().unwrap(), 0).unwrap();
        assert_eq!(bytes(&got), bytes(&want));
    }
}

#[test]
fn no_head_sees_half_a_merge() {
    let mut layer = layer(DType::F32);
    let head = layer.tied_head();
    let hidden = noise(&[1, DIM], DType::F32, 3);
    let whole = bytes(&head.forward(&hidden).unwrap());
    layer
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    let merged = bytes(&head.forward(&hidden).unwrap());
    layer.unmerge().unwrap();
    assert_ne!(whole, merged);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            for _ in 0..500 {
                let got = bytes(&head.forward(&hidden).unwrap());
                assert!(got == whole || got == merged);
            }
        });
        while !reader.is_finished() {
            layer
                .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
                .unwrap();
            layer.unmerge().unwrap();
        }
        reader.join().unwrap();
    });
}

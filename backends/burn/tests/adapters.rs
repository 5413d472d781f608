//! Several adapters by name: active at once, one per example, merged, switched off, recorded.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::module::Module;
use burn::nn::Linear;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use common::{DTYPES, assert_close, bytes, device, embedding, ids, linear, noise, values};
use trainable_tokens_burn::{Burn, BurnDelta, TrainableTokens, backward};
use trainable_tokens_core::{
    Backend, BackendError, DType as CoreDType, DeltaStore, ErrorKind, MergeCheck, Overlap, RowMix, Sgd,
    SgdConfig, TokenRows, TokenSet,
};

const VOCAB: usize = 10;
const DIM: usize = 4;
/// The tokens of the adapters `default`, `b` and `c`: the first two share 2, the last two 5.
const DEFAULT: [u32; 2] = [7, 2];
const B: [u32; 2] = [2, 5];
const C: [u32; 2] = [9, 5];

fn set(ids: &[u32]) -> TokenSet {
    TokenSet::new(ids.iter().copied(), VOCAB).unwrap()
}

fn rows(seed: usize) -> TokenRows {
    TokenRows::new(values(&noise([2, DIM], DType::F64, seed)), 2, DIM).unwrap()
}

fn layer(dtype: DType) -> TrainableTokens {
    let mut embed = TrainableTokens::wrap(embedding(VOCAB, DIM, dtype), &DEFAULT).unwrap();
    embed.set_rows(&rows(2)).unwrap();
    let wide = rows(3).to_dtype(CoreDType::F32);
    embed.add_adapter_with_rows("b", set(&B), &wide).unwrap();
    let own = match dtype {
        DType::F64 => CoreDType::F64,
        DType::F32 => CoreDType::F32,
        DType::F16 => CoreDType::F16,
        _ => CoreDType::BF16,
    };
    embed
        .add_adapter_with_rows("c", set(&C), &rows(4).to_dtype(own))
        .unwrap();
    embed
}

/// The row of an adapter as the table would hold it.
fn row(embed: &TrainableTokens, adapter: &str, slot: usize) -> Vec<f64> {
    let delta = embed.adapter(adapter).unwrap().delta().val().detach();
    let dtype = embed.embedding().weight.val().dtype();
    values(&delta.cast(dtype))[slot * DIM..][..DIM].to_vec()
}

fn lookup(embed: &TrainableTokens, id: i64) -> Vec<f64> {
    values(&embed.lookup(ids(&[id])).unwrap())
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        _ => 2e-2,
    }
}

fn gradient(embed: &TrainableTokens, name: &str, gradients: &Gradients) -> Vec<f64> {
    let gradient = embed.adapter(name).unwrap().gradient(gradients).unwrap();
    gradient.to_f64_vec()
}

fn table(embed: &TrainableTokens) -> Vec<u8> {
    bytes(&embed.embedding().weight)
}

#[test]
fn active_adapters_act_together() {
    for dtype in DTYPES {
        let mut embed = layer(dtype);
        let base = values(&embed.embedding().forward(ids(&[5])));
        embed.activate(&["default", "c"]).unwrap();
        assert_eq!(lookup(&embed, 7), row(&embed, "default", 0));
        assert_eq!(lookup(&embed, 9), row(&embed, "c", 0));
        assert_eq!(lookup(&embed, 5), row(&embed, "c", 1));

        let error = embed.activate(&["default", "b"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overlap);
        assert_eq!(embed.active_names().collect::<Vec<_>>(), ["default", "c"]);

        embed
            .activate_overlapping(&["default", "b"], Overlap::LastWins)
            .unwrap();
        assert_eq!(lookup(&embed, 2), row(&embed, "b", 0));
        assert_eq!(embed.tokens().unwrap().to_vec(), [7, 2, 5]);
        embed
            .activate_overlapping(&["b", "default"], Overlap::LastWins)
            .unwrap();
        assert_eq!(lookup(&embed, 2), row(&embed, "default", 1));

        let mean = Overlap::WeightedMean(vec![1.0, 3.0]);
        embed
            .activate_overlapping(&["default", "b"], mean.clone())
            .unwrap();
        assert_eq!(*embed.overlap(), mean);
        let both = row(&embed, "default", 1).into_iter().zip(row(&embed, "b", 0));
        let want: Vec<f64> = both.map(|(a, b)| 0.25 * a + 0.75 * b).collect();
        assert_close("mean", &lookup(&embed, 2), &want, tolerance(dtype));

        embed.activate(&[]).unwrap();
        assert_eq!(lookup(&embed, 5), base);
    }
}

#[test]
fn a_combination_is_what_core_makes_of_the_rows() {
    for dtype in DTYPES {
        for overlap in [
            Overlap::LastWins,
            Overlap::WeightedMean(vec![1.0, 2.0, 0.3]),
            Overlap::WeightedMean(vec![1e-300, 1e300, 1.0]),
        ] {
            let mut embed = layer(dtype);
            let (before, all) = (table(&embed), ids(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]));
            embed
                .activate_overlapping(&["default", "b", "c"], overlap.clone())
                .unwrap();
            let live = bytes(&embed.forward(all.clone()));
            let hidden = noise([3, DIM], dtype, 5);
            let logits = embed.tied_head().forward(hidden.clone());
            embed.merge_checked(MergeCheck::Finite).unwrap();
            assert_ne!(table(&embed), before);
            assert_eq!(bytes(&embed.forward(all)), live, "{dtype:?} {overlap:?}");
            let merged = embed.tied_head().forward(hidden);
            assert_close("head", &values(&logits), &values(&merged), tolerance(dtype));
            embed.unmerge().unwrap();
            assert_eq!(table(&embed), before);
        }
    }
}

/// The gradient of a table's row of `id` from a lookup of `ids` and a head of `hidden`.
fn dense(id: u32, ids: &[i64], upstream: &[f64], hidden: &[f64], logits: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; DIM];
    for (at, sum) in sum.iter_mut().enumerate() {
        let looked_up = ids
            .iter()
            .enumerate()
            .filter(|(_, other)| **other == i64::from(id));
        *sum += looked_up.map(|(n, _)| upstream[n * DIM + at]).sum::<f64>();
        let states = hidden.chunks(DIM).zip(logits.chunks(VOCAB));
        *sum += states
            .map(|(hidden, logits)| hidden[at] * logits[id as usize])
            .sum::<f64>();
    }
    sum
}

#[test]
fn every_active_adapter_gets_its_share_of_the_gradient() {
    for dtype in DTYPES {
        let mut embed = layer(dtype);
        let batch = [2, 5, 2, 1, 9, 7];
        let upstream: Tensor<3> = noise([1, 6, DIM], dtype, 6);
        let (hidden, logits): (Tensor<2>, Tensor<2>) =
            (noise([3, DIM], dtype, 7), noise([3, VOCAB], dtype, 8));
        // The weight of each adapter's row of 7, 2, 2, 5, 9 and 5 in what the lookup sees.
        for (overlap, shares) in [
            (Overlap::LastWins, [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]),
            (
                Overlap::WeightedMean(vec![1.0, 3.0, 1.0]),
                [1.0, 0.25, 0.75, 0.75, 1.0, 0.25],
            ),
        ] {
            embed
                .activate_overlapping(&["default", "b", "c"], overlap)
                .unwrap();
            let looked_up = (embed.forward(ids(&batch)) * upstream.clone()).sum();
            let out = embed.tied_head().forward(hidden.clone()) * logits.clone();
            let gradients = backward(&(looked_up + out.sum())).unwrap();
            let adapters = [("default", DEFAULT), ("b", B), ("c", C)];
            for (at, (name, tokens)) in adapters.into_iter().enumerate() {
                let want = tokens.iter().zip(&shares[2 * at..]).flat_map(|(id, share)| {
                    let [upstream, hidden, logits] = [values(&upstream), values(&hidden), values(&logits)];
                    let dense = dense(*id, &batch, &upstream, &hidden, &logits);
                    dense.into_iter().map(move |x| x * share)
                });
                let want: Vec<f64> = want.collect();
                let got = embed.adapter(name).unwrap().gradient(&gradients).unwrap();
                let own = embed.adapter(name).unwrap().rows().unwrap().dtype();
                assert_eq!(got.dtype(), own);
                let tolerance = if own == CoreDType::F32 || dtype == DType::F64 {
                    1e-5
                } else {
                    tolerance(dtype)
                };
                assert_close(&format!("{dtype:?} {name}"), &got.to_f64_vec(), &want, tolerance);
            }
        }
    }
}

#[test]
fn a_batch_without_their_tokens_gives_all_adapters_zeros() {
    for dtype in DTYPES {
        let mut embed = layer(dtype);
        let mean = Overlap::WeightedMean(vec![1.0, 1.0, 1.0]);
        embed.activate_overlapping(&["default", "b", "c"], mean).unwrap();
        let gradients = backward(&embed.forward(ids(&[1, 3])).sum()).unwrap();
        for name in ["default", "b", "c"] {
            assert_eq!(gradient(&embed, name, &gradients), [0.0; 8]);
        }
    }
}

#[test]
fn inactive_and_merged_adapters_get_no_gradient() {
    let mut embed = layer(DType::F32);
    embed.activate(&["default", "c"]).unwrap();
    let kind = |embed: &TrainableTokens, name: &str, gradients: &Gradients| {
        let error = embed.adapter(name).unwrap().gradient(gradients);
        error.unwrap_err().kind()
    };
    let gradients = backward(&embed.forward(ids(&[2, 5, 9])).sum()).unwrap();
    assert_eq!(kind(&embed, "b", &gradients), ErrorKind::NoGradient);
    assert_eq!(embed.gradient(&gradients).unwrap_err().kind(), ErrorKind::State);
    assert_eq!(embed.delta().unwrap_err().kind(), ErrorKind::State);
    embed
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    assert!(embed.adapter("c").unwrap().is_merged() && !embed.adapter("b").unwrap().is_merged());
    let gradients = backward(&embed.forward(ids(&[2, 5, 9])).sum()).unwrap();
    assert_eq!(kind(&embed, "c", &gradients), ErrorKind::NoGradient);
    assert_eq!(gradient(&embed, "default", &gradients)[4..], [1.0; 4]);
}

/// A mixed batch of five examples, two of which are neighbours with the same adapter.
const MIXED: [Option<&str>; 5] = [Some("b"), None, Some("default"), Some("default"), Some("c")];

fn mixed_ids() -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..15).map(|at| [2, 5, 7, 9, 1, 2, 0][at % 7]).collect();
    Tensor::from_data(TensorData::new(ids, [5, 3]), (&device(), DType::I64))
}

/// The layer as one example alone sees it.
fn alone(dtype: DType, name: Option<&str>) -> TrainableTokens {
    let mut embed = layer(dtype);
    embed.activate(name.as_slice()).unwrap();
    embed
}

#[test]
fn a_mixed_batch_is_its_examples_alone() {
    for dtype in DTYPES {
        let embed = layer(dtype);
        let rows = embed.lookup_mixed(mixed_ids(), &MIXED).unwrap();
        let hidden: Tensor<3> = noise([5, 3, DIM], dtype, 6);
        let logits = embed.tied_head().logits_mixed(hidden.clone(), &MIXED).unwrap();
        assert_eq!((rows.dims(), logits.dims()), ([5, 3, DIM], [5, 3, VOCAB]));
        for (at, name) in MIXED.into_iter().enumerate() {
            let single = alone(dtype, name);
            let want = single.forward(mixed_ids().narrow(0, at, 1));
            assert_eq!(bytes(&rows.clone().narrow(0, at, 1)), bytes(&want), "{name:?}");
            let want = single.tied_head().forward(hidden.clone().narrow(0, at, 1));
            let got = logits.clone().narrow(0, at, 1);
            assert_close("logits", &values(&got), &values(&want), tolerance(dtype));
        }
    }
}

#[test]
fn a_mixed_batch_has_the_gradients_of_its_examples() {
    for dtype in DTYPES {
        let embed = layer(dtype);
        let weights: Tensor<3> = noise([5, 3, VOCAB], dtype, 8);
        let residual: Tensor<3> = noise([5, 3, DIM], dtype, 9);
        let hidden = embed.lookup_mixed(mixed_ids(), &MIXED).unwrap();
        let logits = embed.tied_head().logits_mixed(hidden.clone(), &MIXED).unwrap();
        let loss = (logits * weights.clone()).sum() + (hidden * residual.clone()).sum();
        let gradients = backward(&loss).unwrap();
        for name in ["default", "b", "c"] {
            let mut want = vec![0.0; 2 * DIM];
            for at in (0..5).filter(|at| MIXED[*at] == Some(name)) {
                let single = alone(dtype, MIXED[at]);
                let hidden = single.forward(mixed_ids().narrow(0, at, 1));
                let logits = single.tied_head().forward(hidden.clone());
                let loss = (logits * weights.clone().narrow(0, at, 1)).sum()
                    + (hidden * residual.clone().narrow(0, at, 1)).sum();
                let one = gradient(&single, name, &backward(&loss).unwrap());
                want.iter_mut().zip(one).for_each(|(sum, x)| *sum += x);
            }
            assert!(want.iter().any(|x| *x != 0.0));
            let got = gradient(&embed, name, &gradients);
            assert_close(&format!("{dtype:?} {name}"), &got, &want, tolerance(dtype));
        }
    }
}

#[test]
fn a_mixed_head_keeps_its_bias_and_takes_no_examples() {
    let embed = layer(DType::F32);
    let bias: Tensor<1> = noise([VOCAB], DType::F32, 9);
    let hidden: Tensor<2> = noise([5, DIM], DType::F32, 6);
    let plain = embed.tied_head().logits_mixed(hidden.clone(), &MIXED).unwrap();
    let head = embed.tied_head().with_bias(bias.clone()).unwrap();
    let got = head.logits_mixed(hidden, &MIXED).unwrap();
    assert_eq!(bytes(&got), bytes(&(plain + bias.unsqueeze())));

    // Examples without a token, and no example.
    for (names, batch) in [(&MIXED[..], 5), (&[], 0)] {
        let hidden: Tensor<3> = noise([batch, 0, DIM], DType::F32, 6);
        let logits = embed.tied_head().logits_mixed(hidden, names).unwrap();
        assert_eq!(logits.dims(), [batch, 0, VOCAB]);
        let none = TensorData::new(Vec::<i64>::new(), [batch, 0]);
        let none = Tensor::from_data(none, (&device(), DType::I64));
        assert_eq!(embed.lookup_mixed(none, names).unwrap().dims(), [batch, 0, DIM]);
    }
}

#[test]
fn mixed_batches_that_do_not_fit_are_refused() {
    let mut embed = layer(DType::F32);
    let kind = |embed: &TrainableTokens, names: &[Option<&str>]| {
        let lookup = embed.lookup_mixed(mixed_ids(), names).unwrap_err().kind();
        let hidden: Tensor<3> = noise([5, 3, DIM], DType::F32, 6);
        let head = embed.tied_head().logits_mixed(hidden, names).unwrap_err().kind();
        assert_eq!(lookup, head);
        head
    };
    assert_eq!(kind(&embed, &[Some("d"); 5]), ErrorKind::Adapter);
    assert_eq!(kind(&embed, &[None; 15]), ErrorKind::Shape);
    embed.disable().unwrap();
    assert_eq!(kind(&embed, &MIXED), ErrorKind::State);
    embed.enable();
    embed.merge().unwrap();
    assert_eq!(kind(&embed, &MIXED), ErrorKind::State);
}

#[test]
fn disabled_adapters_leave_the_base() {
    let mut embed = layer(DType::F32);
    embed.activate(&["default", "c"]).unwrap();
    let hidden: Tensor<2> = noise([3, DIM], DType::F32, 6);
    let both = |embed: &TrainableTokens| {
        let logits = embed.tied_head().forward(hidden.clone());
        (bytes(&embed.forward(ids(&[7, 9, 1]))), bytes(&logits))
    };
    let (live, base) = (both(&embed), both(&alone(DType::F32, None)));
    embed.disable().unwrap();
    assert!(!embed.is_enabled());
    assert_eq!(both(&embed), base);
    assert_eq!(embed.merge().unwrap_err().kind(), ErrorKind::State);
    embed.enable();
    assert_eq!(both(&embed), live);
    assert_ne!(live, base);
}

#[test]
fn merges_are_undone_in_their_order() {
    let mut embed = layer(DType::BF16);
    let mut tables = vec![table(&embed)];
    for name in ["default", "b", "c"] {
        embed
            .merge_adapters(&[name], &Overlap::LastWins, MergeCheck::Unchecked)
            .unwrap();
        tables.push(table(&embed));
    }
    let merges: Vec<Vec<&str>> = embed.merges().map(Iterator::collect).collect();
    assert_eq!(merges, [["default"], ["b"], ["c"]]);
    assert_eq!(embed.delete_adapter("b").unwrap_err().kind(), ErrorKind::State);
    while let Some(want) = tables.pop() {
        assert_eq!(table(&embed), want);
        assert_eq!(embed.unmerge().is_ok(), !tables.is_empty());
    }
}

#[test]
fn a_merge_that_is_refused_changes_nothing() {
    let mut embed = layer(DType::F16);
    let before = table(&embed);
    let huge = TokenRows::new(vec![1e30f32; 8], 2, DIM).unwrap();
    embed.adapter_mut("b").unwrap().set_rows(&huge).unwrap();
    embed.activate(&["b"]).unwrap();
    let error = embed.merge_checked(MergeCheck::Finite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    assert!(!embed.is_merged());
    assert_eq!(table(&embed), before);
}

#[test]
fn a_deleted_adapter_is_handed_over() {
    let mut embed = layer(DType::F32);
    assert_eq!(
        embed.delete_adapter("default").unwrap_err().kind(),
        ErrorKind::State
    );
    let (tokens, delta) = embed.delete_adapter("b").unwrap().into_parts();
    assert_eq!(tokens.to_vec(), B);
    assert!(delta.read().unwrap().bits_eq(&rows(3).to_dtype(CoreDType::F32)));
    assert_eq!(embed.adapter("b").unwrap_err().kind(), ErrorKind::Adapter);
    assert_eq!(embed.adapters().count(), 2);

    let mut frozen = TrainableTokens::frozen(embedding(VOCAB, DIM, DType::F32)).unwrap();
    assert_eq!(frozen.adapters().count(), 0);
    frozen.add_adapter("b", set(&B)).unwrap();
    assert_eq!(frozen.adapter("b").unwrap().tokens().unwrap().to_vec(), B);
    assert!(frozen.tokens().unwrap().is_empty());
}

#[test]
fn a_combination_is_no_parameter() {
    let (a, b) = (rows(2), rows(3).to_dtype(CoreDType::F32));
    let [a, b] = [a, b].map(|rows| BurnDelta::new(&rows, &device()).unwrap());
    let stack = RowMix::stack(vec![2, 2]).unwrap();
    let mut both = Burn::combine(&[&a, &b], &stack).unwrap();
    assert_eq!(both.dtype(), CoreDType::F64);
    let gradients = backward(&both.tensor().sum()).unwrap();
    assert!(Burn::gradient(&gradients, &both).unwrap().is_none());
    let of_b = Burn::gradient(&gradients, &b).unwrap().unwrap();
    assert_eq!((of_b.dtype(), of_b.to_f64_vec()), (CoreDType::F32, vec![1.0; 8]));
    let read = both.read().unwrap();
    assert_eq!(both.write(&read).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(both.param().unwrap_err().kind(), ErrorKind::Unsupported);
    let kind = |deltas: &[&BurnDelta]| Burn::combine(deltas, &stack).unwrap_err().kind();
    assert_eq!(kind(&[&both, &a]), ErrorKind::Unsupported);
    assert_eq!(kind(&[&a]), ErrorKind::Shape);
    assert_eq!(kind(&[]), ErrorKind::Shape);
    assert_eq!(both.into_param().unwrap_err().kind(), ErrorKind::Unsupported);
}

#[derive(Module, Debug)]
struct Model {
    embed: TrainableTokens,
    head: Linear,
}

impl Model {
    fn loss(&self, names: &[Option<&str>]) -> Tensor<1> {
        let batch = mixed_ids().narrow(0, 0, names.len());
        let hidden = self.embed.lookup_mixed(batch, names).unwrap();
        (self.head.forward(hidden) - 0.5).square().mean()
    }
}

#[test]
fn burns_optimizer_trains_the_adapters_that_were_used() {
    let embed = layer(DType::F32);
    let head = linear(4, 3);
    let mut model = Model { embed, head };
    let bits = |model: &Model, name: &str| {
        let rows = model.embed.adapter(name).unwrap().rows().unwrap();
        rows.to_le_bytes()
    };
    let before = ["default", "b", "c"].map(|name| bits(&model, name));
    let start = table(&model.embed);
    let mut adam = AdamWConfig::new().with_weight_decay(0.1).init();
    for _ in 0..3 {
        let loss = model.loss(&[Some("b"), None, Some("c")]);
        let gradients = GradientsParams::from_grads(backward(&loss).unwrap(), &model);
        assert_eq!(gradients.len(), 2);
        model = adam.step(0.05, model, gradients);
    }
    let after = ["default", "b", "c"].map(|name| bits(&model, name));
    assert_eq!(after[0], before[0]);
    assert_ne!(after[1], before[1]);
    assert_ne!(after[2], before[2]);
    assert_eq!(table(&model.embed), start);

    // So does a step of core's for the adapter that is named, and burn's parameter stays the same.
    let loss = model.loss(&[Some("b"), Some("default")]);
    let (gradients, id) = (
        backward(&loss).unwrap(),
        model.embed.adapter("b").unwrap().delta().id,
    );
    let mut sgd = Sgd::new(SgdConfig::default()).unwrap();
    let adapter = model.embed.adapter_mut("b").unwrap();
    adapter.step(&gradients, &mut sgd, &mut []).unwrap();
    assert_ne!(bits(&model, "b"), after[1]);
    assert_eq!(bits(&model, "default"), after[0]);
    assert_eq!(model.embed.adapter("b").unwrap().delta().id, id);
}

#[test]
fn a_record_brings_all_adapters_and_merges() {
    let record =
        |embed: TrainableTokens| ModuleRecord::from_bytes(embed.into_record().into_bytes().unwrap()).unwrap();
    let mut embed = layer(DType::F32);
    embed
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    let want = bytes(&embed.forward(mixed_ids()));
    let mut other = TrainableTokens::wrap(embedding(VOCAB, DIM, DType::F32), &[0, 1]).unwrap();
    for (name, ids) in [("b", [3, 4]), ("c", [8, 6])] {
        let rows = rows(9).to_dtype(CoreDType::F32);
        other.add_adapter_with_rows(name, set(&ids), &rows).unwrap();
    }
    other
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    let mut loaded = other.load_record(record(embed));
    assert_eq!(bytes(&loaded.forward(mixed_ids())), want);
    assert_eq!(loaded.adapter("b").unwrap().tokens().unwrap().to_vec(), B);
    loaded.unmerge().unwrap();
    assert_eq!(table(&loaded), bytes(&embedding(VOCAB, DIM, DType::F32).weight));

    let group = loaded.adapter("b").unwrap().row_params();
    assert_eq!(loaded.clone().into_record_group(group).len(), 2);
    assert_eq!(loaded.clone().into_record_group(loaded.row_params()).len(), 6);
}

#[test]
fn clones_and_other_devices_keep_the_adapters() {
    let mut embed = layer(DType::F32);
    let mean = Overlap::WeightedMean(vec![1.0, 3.0]);
    embed.activate_overlapping(&["default", "b"], mean).unwrap();
    let want = bytes(&embed.forward(mixed_ids()));
    let plain = embed.valid().fork(&Device::flex());
    let batch = Tensor::from_data(mixed_ids().into_data(), &Device::flex());
    assert_eq!(bytes(&plain.forward(batch)), want);
    // A clone goes its own way.
    let mut clone = embed.clone();
    clone.activate(&["c"]).unwrap();
    clone.merge().unwrap();
    assert_eq!(bytes(&embed.forward(mixed_ids())), want);
    assert_ne!(bytes(&clone.forward(mixed_ids())), want);
    assert!(!embed.is_merged());
}

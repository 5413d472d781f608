//! Several adapters by name: active at once, one per example, merged, switched off.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use common::{assert_close, bits, noise};
use dfdx::nn::{Module, ZeroGrads};
use dfdx::optim::{self, Optimizer};
use dfdx::shapes::HasShape;
use dfdx::tensor::{Cpu, Gradients, NoneTape, OwnedTape, Tensor, TensorFrom, TensorFromVec, Trace};
use dfdx::tensor_ops::{Backward, Device, PermuteTo, ReshapeTo, SumTo, TryAdd, TryMul};
use half::f16;
use trainable_tokens_core::{
    Backend, BackendError, DType, DeltaStore, Element, ErrorKind, LayerParts, MergeCheck, Overlap, RowMix,
    TokenAdapter, TokenRows, TokenSet, TrainableTokens as CoreLayer,
};
use trainable_tokens_dfdx::{Dfdx, DfdxDevice, DfdxElement, TrainableTokens};

const VOCAB: usize = 10;
const DIM: usize = 4;
/// The tokens of the adapters `default`, `b` and `c`: the first two share 2, the last two 5.
const DEFAULT: [u32; 2] = [7, 2];
const B: [u32; 2] = [2, 5];
const C: [u32; 2] = [9, 5];

fn set(ids: &[u32]) -> TokenSet {
    TokenSet::new(ids.iter().copied(), VOCAB).unwrap()
}

fn rows<T: DfdxElement>(seed: usize) -> TokenRows {
    TokenRows::new(noise::<T>(2, DIM, seed).as_vec(), 2, DIM).unwrap()
}

fn layer<E: DfdxElement>() -> TrainableTokens<E>
where
    Cpu: DfdxDevice<E>,
{
    let mut embed = TrainableTokens::from_tensor(noise::<E>(VOCAB, DIM, 1), &DEFAULT).unwrap();
    embed.set_rows(&rows::<f32>(2)).unwrap();
    embed
        .add_adapter_with_rows("b", set(&B), &rows::<f32>(3))
        .unwrap();
    embed.add_adapter_with_rows("c", set(&C), &rows::<E>(4)).unwrap();
    embed
}

fn row<E: DfdxElement>(embed: &TrainableTokens<E>, adapter: &str, slot: usize) -> Vec<f64>
where
    Cpu: DfdxDevice<E>,
{
    let rows = embed.adapter(adapter).unwrap().rows().unwrap();
    rows.to_dtype(E::DTYPE).to_f64_vec()[slot * DIM..][..DIM].to_vec()
}

fn values<S: dfdx::shapes::Shape, E: DfdxElement, T>(tensor: &Tensor<S, E, Cpu, T>) -> Vec<f64> {
    tensor.as_vec().into_iter().map(Element::to_f64).collect()
}

fn tolerance<E: Element>() -> f64 {
    match E::DTYPE.size_in_bytes() {
        8 => 1e-12,
        4 => 1e-5,
        _ => 1e-2,
    }
}

fn gradient<E: DfdxElement>(embed: &TrainableTokens<E>, name: &str, gradients: &Gradients<E, Cpu>) -> Vec<f64>
where
    Cpu: DfdxDevice<E>,
{
    let gradient = embed.adapter(name).unwrap().gradient(gradients).unwrap();
    gradient.to_f64_vec()
}

#[test]
fn active_adapters_act_together() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E>,
    {
        let mut embed = layer::<E>();
        let lookup = |embed: &TrainableTokens<E>, id: u32| values(&embed.lookup(&[id], NoneTape).unwrap());
        let base = lookup(&embed, 5);
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
        embed
            .activate_overlapping(&["b", "default"], Overlap::LastWins)
            .unwrap();
        assert_eq!(lookup(&embed, 2), row(&embed, "default", 1));

        let mean = Overlap::WeightedMean(vec![1.0, 3.0]);
        embed.activate_overlapping(&["default", "b"], mean).unwrap();
        let both = row(&embed, "default", 1).into_iter().zip(row(&embed, "b", 0));
        let want: Vec<f64> = both.map(|(a, b)| 0.25 * a + 0.75 * b).collect();
        assert_close("mean", &lookup(&embed, 2), &want, tolerance::<E>());
        assert_eq!(lookup(&embed, 7), row(&embed, "default", 0));

        embed.activate(&[]).unwrap();
        assert_eq!(lookup(&embed, 5), base);
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn merging_several_changes_no_bit_of_a_lookup() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let names = ["default", "b", "c"];
        let ids: Vec<u32> = (0..10).collect();
        for overlap in [
            Overlap::LastWins,
            Overlap::WeightedMean(vec![1.0, 2.0, 0.3]),
            Overlap::WeightedMean(vec![1e-300, 1e300, 1.0]),
        ] {
            let mut embed = layer::<E>();
            let before = bits(embed.table().tensor());
            embed.activate_overlapping(&names, overlap.clone()).unwrap();
            let live = bits(&embed.lookup(&ids, OwnedTape::default()).unwrap());
            let hidden = noise::<E>(3, DIM, 5);
            let logits = embed.tied_head().logits(hidden.clone()).unwrap();
            embed.merge_checked(MergeCheck::Finite).unwrap();
            assert_ne!(bits(embed.table().tensor()), before);
            assert_eq!(
                bits(&embed.lookup(&ids, NoneTape).unwrap()),
                live,
                "{} {overlap:?}",
                E::DTYPE
            );
            let merged = embed.tied_head().logits(hidden).unwrap();
            assert_close("head", &values(&logits), &values(&merged), tolerance::<E>());
            embed.unmerge().unwrap();
            assert_eq!(bits(embed.table().tensor()), before);
        }
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

/// The gradient of a table's row of `id` from a lookup of `ids` and a head of `hidden`.
fn dense<E: DfdxElement>(
    id: u32,
    ids: &[u32],
    upstream: &Tensor<(usize, usize), E, Cpu>,
    hidden: &Tensor<(usize, usize), E, Cpu>,
    logits: &Tensor<(usize, usize), E, Cpu>,
) -> Vec<f64> {
    let (upstream, hidden, logits) = (values(upstream), values(hidden), values(logits));
    let mut sum = vec![0.0; DIM];
    for (at, sum) in sum.iter_mut().enumerate() {
        let looked_up = ids.iter().enumerate().filter(|(_, other)| **other == id);
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
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let mut embed = layer::<E>();
        let ids = [2, 5, 2, 1, 9, 7];
        let (upstream, hidden) = (noise::<E>(6, DIM, 6), noise::<E>(3, DIM, 7));
        let logits = noise::<E>(3, VOCAB, 8);
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
            let looked_up = embed.lookup(&ids, OwnedTape::default()).unwrap();
            let looked_up = looked_up.try_mul(upstream.clone()).unwrap().sum::<(), _>();
            let out = embed.tied_head().logits(hidden.leaky_trace()).unwrap();
            let out = out.try_mul(logits.clone()).unwrap().sum::<(), _>();
            let gradients = looked_up.try_add(out).unwrap().try_backward().unwrap();
            let adapters = [("default", DEFAULT), ("b", B), ("c", C)];
            for (at, (name, tokens)) in adapters.into_iter().enumerate() {
                let want = tokens.iter().zip(&shares[2 * at..]).flat_map(|(id, share)| {
                    let dense = dense(*id, &ids, &upstream, &hidden, &logits);
                    dense.into_iter().map(move |x| x * share)
                });
                let want: Vec<f64> = want.collect();
                assert_close(name, &gradient(&embed, name, &gradients), &want, tolerance::<E>());
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn inactive_and_merged_adapters_get_no_gradient() {
    let mut embed = layer::<f32>();
    embed.activate(&["default", "c"]).unwrap();
    let backward = |embed: &TrainableTokens<f32>| {
        let out = embed.lookup(&[2, 5, 9], OwnedTape::default()).unwrap();
        out.sum::<(), _>().backward()
    };
    let kind = |embed: &TrainableTokens<f32>, name: &str, gradients: &Gradients<f32, Cpu>| {
        let error = embed.adapter(name).unwrap().gradient(gradients);
        error.unwrap_err().kind()
    };
    let gradients = backward(&embed);
    assert_eq!(kind(&embed, "b", &gradients), ErrorKind::NoGradient);
    assert_eq!(embed.gradient(&gradients).unwrap_err().kind(), ErrorKind::State);
    embed
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    let gradients = backward(&embed);
    assert_eq!(kind(&embed, "c", &gradients), ErrorKind::NoGradient);
    assert_eq!(gradient(&embed, "default", &gradients)[4..], [1.0; 4]);
}

/// A mixed batch of five examples, two of which are neighbours with the same adapter.
const MIXED: [Option<&str>; 5] = [Some("b"), None, Some("default"), Some("default"), Some("c")];

fn mixed_ids() -> Vec<u32> {
    (0..15).map(|at| [2, 5, 7, 9, 1, 2, 0][at % 7]).collect()
}

/// The layer as one example alone sees it.
fn alone<E: DfdxElement>(name: Option<&str>) -> TrainableTokens<E>
where
    Cpu: DfdxDevice<E>,
{
    let mut embed = layer::<E>();
    embed.activate(name.as_slice()).unwrap();
    embed
}

#[test]
fn a_mixed_batch_is_its_examples_alone() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let embed = layer::<E>();
        let (ids, dev) = (mixed_ids(), Cpu::default());
        let rows = embed.lookup_mixed(&ids, &MIXED, NoneTape).unwrap();
        let hidden = noise::<E>(15, DIM, 6);
        let logits = embed.tied_head().logits_mixed(hidden.clone(), &MIXED).unwrap();
        assert_eq!(logits.shape(), &(15, VOCAB));
        for (at, name) in MIXED.into_iter().enumerate() {
            let single = alone::<E>(name);
            let want = single.lookup(&ids[at * 3..][..3], NoneTape).unwrap();
            let width = 3 * DIM * E::DTYPE.size_in_bytes();
            assert_eq!(bits(&rows)[at * width..][..width], bits(&want), "{name:?}");
            let part = hidden.as_vec()[at * 3 * DIM..][..3 * DIM].to_vec();
            let part = dev.try_tensor_from_vec(part, (3, DIM)).unwrap();
            let want = single.tied_head().logits(part).unwrap();
            let got = &values(&logits)[at * 3 * VOCAB..][..3 * VOCAB];
            assert_close("logits", got, &values(&want), tolerance::<E>());
        }
        // In dfdx's habit, as tensors of two and three dimensions.
        let ids: Tensor<(usize, usize), usize, Cpu> =
            dev.tensor_from_vec(ids.iter().map(|id| *id as usize).collect(), (5, 3));
        let got = embed.forward((ids, &MIXED[..]));
        assert_eq!((got.shape(), bits(&got)), (&(5, 3, DIM), bits(&rows)));
        let hidden = hidden.try_reshape_like(&(5, 3, DIM)).unwrap();
        let got = embed.tied_head().forward((hidden, &MIXED[..]));
        assert_eq!((got.shape(), bits(&got)), (&(5, 3, VOCAB), bits(&logits)));
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn a_mixed_batch_has_the_gradients_of_its_examples() {
    let embed = layer::<f64>();
    let ids = mixed_ids();
    let (weights, residual) = (noise::<f64>(15, VOCAB, 8), noise::<f64>(15, DIM, 9));
    let part = |of: &Tensor<(usize, usize), f64, Cpu>, at: usize, width: usize| {
        let values = of.as_vec()[at * 3 * width..][..3 * width].to_vec();
        Cpu::default().tensor_from_vec(values, (3, width))
    };
    // Lookup and head on one tape, and a second use of the hidden states that the head must not forget.
    let hidden = embed.lookup_mixed(&ids, &MIXED, OwnedTape::default()).unwrap();
    let again = hidden.retaped::<NoneTape>();
    let logits = embed.tied_head().logits_mixed(hidden, &MIXED).unwrap();
    let loss = logits.try_mul(weights.clone()).unwrap().sum::<(), _>();
    let loss = loss + (again.leaky_trace() * residual.clone()).sum::<(), _>();
    let gradients = loss.backward();
    for name in ["default", "b", "c"] {
        let mut want = vec![0.0; 2 * DIM];
        for at in (0..5).filter(|at| MIXED[*at] == Some(name)) {
            let single = alone::<f64>(MIXED[at]);
            let hidden = single.lookup(&ids[at * 3..][..3], OwnedTape::default()).unwrap();
            let again = hidden.retaped::<NoneTape>();
            let logits = single.tied_head().logits(hidden).unwrap();
            let loss = (logits * part(&weights, at, VOCAB)).sum::<(), _>();
            let loss = loss + (again.leaky_trace() * part(&residual, at, DIM)).sum::<(), _>();
            let one = gradient(&single, name, &loss.backward());
            want.iter_mut().zip(one).for_each(|(sum, x)| *sum += x);
        }
        assert!(want.iter().any(|x| *x != 0.0));
        assert_close(name, &gradient(&embed, name, &gradients), &want, 1e-12);
    }
    // Hidden states with strides of their own, without a lookup.
    let leaf = noise::<f64>(DIM, 15, 3).permute::<(usize, usize), _>();
    let logits = embed
        .tied_head()
        .logits_mixed(leaf.leaky_trace(), &MIXED)
        .unwrap();
    let loss = (logits * weights.clone()).sum::<(), _>();
    let got = values(&loss.backward().get(&leaf));
    for (at, name) in MIXED.into_iter().enumerate() {
        let part_of_leaf = part(&leaf, at, DIM);
        let head = alone::<f64>(name);
        let logits = head.tied_head().logits(part_of_leaf.leaky_trace()).unwrap();
        let loss = (logits * part(&weights, at, VOCAB)).sum::<(), _>();
        let want = values(&loss.backward().get(&part_of_leaf));
        assert_close("hidden", &got[at * 3 * DIM..][..3 * DIM], &want, 1e-12);
    }
}

#[test]
fn a_mixed_head_keeps_its_bias_and_takes_no_examples() {
    let embed = layer::<f32>();
    let dev = Cpu::default();
    let bias: Tensor<(usize,), f32, Cpu> = dev.tensor_from_vec(noise::<f32>(1, VOCAB, 9).as_vec(), (VOCAB,));
    let hidden = noise::<f32>(5, DIM, 6);
    let plain = embed.tied_head().logits_mixed(hidden.clone(), &MIXED).unwrap();
    let repeated = dev.tensor_from_vec(bias.as_vec().repeat(5), (5, VOCAB));
    let head = embed.tied_head().with_bias(bias).unwrap();
    let got = head.logits_mixed(hidden.leaky_trace(), &MIXED).unwrap();
    assert_eq!(bits(&got), bits(&(plain + repeated)));

    // Examples without a token, and no example.
    for names in [&MIXED[..], &[]] {
        let leaf: Tensor<(usize, usize), f32, Cpu> = dev.tensor_from_vec(vec![], (0, DIM));
        let logits = embed.tied_head().logits_mixed(leaf.leaky_trace(), names).unwrap();
        assert_eq!(logits.shape(), &(0, VOCAB));
        let rows = embed.lookup_mixed(&[], names, NoneTape).unwrap();
        assert_eq!(rows.shape(), &(0, DIM));
    }
}

#[test]
fn mixed_batches_that_do_not_fit_are_refused() {
    let mut embed = layer::<f32>();
    let ids = mixed_ids();
    let kind = |embed: &TrainableTokens<f32>, names: &[Option<&str>]| {
        let lookup = embed.lookup_mixed(&ids, names, NoneTape).unwrap_err().kind();
        let hidden = noise::<f32>(15, DIM, 6);
        let head = embed.tied_head().logits_mixed(hidden, names).unwrap_err().kind();
        assert_eq!(lookup, head);
        head
    };
    assert_eq!(kind(&embed, &[Some("d"); 5]), ErrorKind::Adapter);
    assert_eq!(kind(&embed, &[None; 4]), ErrorKind::Shape);
    let dev = Cpu::default();
    let error = embed.try_forward((dev.tensor([[1, 2], [3, 4]]), &[None; 4][..]));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Shape);
    let deep = noise::<f32>(4, DIM, 6).reshape_like(&(2, 2, DIM));
    let error = embed.tied_head().try_forward((deep, &[None; 4][..]));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Shape);

    embed.disable().unwrap();
    assert_eq!(kind(&embed, &MIXED), ErrorKind::State);
    embed.enable();
    embed.merge().unwrap();
    assert_eq!(kind(&embed, &MIXED), ErrorKind::State);
}

#[test]
fn disabled_adapters_leave_the_base() {
    let mut embed = layer::<f32>();
    embed.activate(&["default", "c"]).unwrap();
    let hidden = noise::<f32>(3, DIM, 6);
    let both = |embed: &TrainableTokens<f32>| {
        let rows = embed.lookup(&[7, 9, 1], NoneTape).unwrap();
        let logits = embed.tied_head().logits(hidden.clone()).unwrap();
        (bits(&rows), bits(&logits))
    };
    let live = both(&embed);
    embed.disable().unwrap();
    assert_eq!(both(&embed), both(&alone(None)));
    assert_eq!(embed.merge().unwrap_err().kind(), ErrorKind::State);
    embed.enable();
    assert_eq!(both(&embed), live);
    assert_ne!(live, both(&alone(None)));
}

#[test]
fn merges_are_undone_in_their_order() {
    let mut embed = layer::<f32>();
    let table = |embed: &TrainableTokens<f32>| bits(embed.table().tensor());
    let mut tables = vec![table(&embed)];
    for name in ["default", "b", "c"] {
        embed
            .merge_adapters(&[name], &Overlap::LastWins, MergeCheck::Unchecked)
            .unwrap();
        tables.push(table(&embed));
    }
    let merges: Vec<Vec<&str>> = embed.merges().map(Iterator::collect).collect();
    assert_eq!(merges, [["default"], ["b"], ["c"]]);
    while let Some(want) = tables.pop() {
        assert_eq!(table(&embed), want);
        assert_eq!(embed.unmerge().is_ok(), !tables.is_empty());
    }
}

#[test]
fn a_deleted_adapter_is_handed_over() {
    let mut embed = layer::<f32>();
    assert_eq!(
        embed.delete_adapter("default").unwrap_err().kind(),
        ErrorKind::State
    );
    let (tokens, delta) = embed.delete_adapter("b").unwrap().into_parts();
    assert_eq!(tokens.to_vec(), B);
    assert!(delta.read().unwrap().bits_eq(&rows::<f32>(3)));
    assert_eq!(embed.adapter("b").unwrap_err().kind(), ErrorKind::Adapter);
}

#[test]
fn rows_of_different_types_train_in_their_own() {
    // Over a table of f16: rows of f32 in two adapters, of f16 in one.
    let mut embed = layer::<f16>();
    embed.activate(&["b", "default"]).unwrap_err();
    embed
        .activate_overlapping(&["default", "b", "c"], Overlap::WeightedMean(vec![1.0, 1.0, 1.0]))
        .unwrap();
    let combined = embed.layer_rows();
    assert_eq!(combined.to_f32_vec().len(), 4 * DIM);
    let parts = ["default", "b", "c"].map(|name| embed.adapter(name).unwrap().rows().unwrap());
    assert_eq!(
        parts.each_ref().map(TokenRows::dtype),
        [DType::F32, DType::F32, DType::F16]
    );
    let mean = |a: f32, b: f32| a * 0.5 + b * 0.5;
    let (default, b, c) = (
        parts[0].to_f32_vec(),
        parts[1].to_f32_vec(),
        parts[2].to_f32_vec(),
    );
    let want: Vec<f32> = (0..DIM).map(|at| mean(default[DIM + at], b[at])).collect();
    assert_eq!(combined.to_f32_vec()[..DIM], want);
    let want: Vec<f32> = (0..DIM).map(|at| mean(b[DIM + at], c[DIM + at])).collect();
    assert_eq!(combined.to_f32_vec()[DIM..2 * DIM], want);
}

trait LayerRows {
    /// The rows that outputs are made with.
    fn layer_rows(&self) -> TokenRows;
}

impl<E: DfdxElement> LayerRows for TrainableTokens<E>
where
    Cpu: DfdxDevice<E>,
{
    fn layer_rows(&self) -> TokenRows {
        self.active().unwrap().unwrap().read().unwrap()
    }
}

#[test]
fn a_combination_is_no_leaf() {
    let mut embed = layer::<f32>();
    embed.activate(&["default", "c"]).unwrap();
    let gradients = embed.lookup(&[7], OwnedTape::default()).unwrap();
    let gradients = gradients.sum::<(), _>().backward();
    let combined = embed.active().unwrap().unwrap();
    assert!(Dfdx::gradient(&gradients, &combined).unwrap().is_none());
    let mut delta = (*combined).clone();
    let rows = delta.read().unwrap();
    assert_eq!(delta.write(&rows).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(
        delta.to_const::<4, 4>().unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    let mix = RowMix::stack(vec![4]).unwrap();
    let error = Dfdx::<f32>::combine(&[&delta], &mix).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let leaf = embed.adapter("c").unwrap().delta();
    let error = Dfdx::<f32>::combine(&[leaf], &mix).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
    let error = Dfdx::<f32>::combine(&[], &mix).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

#[test]
fn dfdxs_optimizer_trains_the_adapter_that_is_named() {
    let mut embed = layer::<f32>();
    embed.activate(&["default", "c"]).unwrap();
    let error = embed.change_rows::<2, DIM, _>(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    let rows_of = |embed: &TrainableTokens<f32>, name: &str| {
        let rows = embed.adapter(name).unwrap().rows().unwrap();
        rows.to_le_bytes()
    };
    let before = ["default", "b", "c"].map(|name| rows_of(&embed, name));
    let config = optim::AdamConfig {
        lr: 0.05,
        ..Default::default()
    };
    let leaf = embed.adapter("c").unwrap().delta().to_const::<2, DIM>().unwrap();
    let mut adam = optim::Adam::new(&leaf, config);
    for _ in 0..3 {
        let out = embed.lookup(&[7, 9, 5, 2], OwnedTape::default()).unwrap();
        let gradients = out.square().sum::<(), _>().backward();
        let update = |rows: &mut Tensor<_, _, _>| adam.update(rows, &gradients);
        embed.change_rows_of::<2, DIM, _>("c", update).unwrap().unwrap();
    }
    let changed = ["default", "b", "c"].map(|name| rows_of(&embed, name));
    assert_eq!(changed[..2], before[..2]);
    assert_ne!(changed[2], before[2]);
}

#[test]
fn a_tape_with_leaves_keeps_the_gradients_of_all_adapters() {
    let embed = layer::<f32>();
    let model: Tensor<dfdx::shapes::Rank2<3, 4>, f32, Cpu> = Cpu::default().tensor([[0.5; 4]; 3]);
    let mut gradients = model.alloc_grads();
    embed.zero_grads(&mut gradients).unwrap();
    for want in [1.0, 2.0] {
        let out = embed
            .lookup_mixed(&[9, 2, 7], &[Some("c"), Some("b"), None], OwnedTape::default())
            .unwrap();
        let model = model.clone().traced(gradients);
        let model: Tensor<(usize, usize), f32, Cpu, _> = dfdx::tensor_ops::RealizeTo::realize(model);
        gradients = (model * 0.0 + out).sum::<(), _>().backward();
        assert_eq!(gradient(&embed, "c", &gradients), [[want; 4], [0.0; 4]].concat());
        assert_eq!(gradient(&embed, "b", &gradients), [[want; 4], [0.0; 4]].concat());
    }
    let fresh = embed.alloc_grads().unwrap();
    let error = embed.adapter("b").unwrap().gradient(&fresh).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);
}

#[test]
fn a_layer_is_its_parts() {
    let mut embed = layer::<f32>();
    embed
        .merge_adapters(&["c"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    let choice = Overlap::WeightedMean(vec![1.0, 3.0]);
    embed.activate_overlapping(&["default", "b"], choice).unwrap_err();
    embed
        .activate_overlapping(&["default", "b"], Overlap::LastWins)
        .unwrap();
    let ids: Vec<u32> = (0..10).collect();
    let (live, table) = (
        bits(&embed.lookup(&ids, NoneTape).unwrap()),
        bits(embed.table().tensor()),
    );
    let before = bits(layer::<f32>().table().tensor());
    let mut again: TrainableTokens<f32> = CoreLayer::from_parts(embed.into_layer().into_parts())
        .unwrap()
        .into();
    assert_eq!(bits(&again.lookup(&ids, NoneTape).unwrap()), live);
    assert_eq!(again.active_names().collect::<Vec<_>>(), ["default", "b"]);
    assert_eq!(bits(again.table().tensor()), table);
    again.unmerge().unwrap();
    assert_eq!(bits(again.table().tensor()), before);

    let kind = |change: fn(&mut LayerParts<Dfdx<f32>>)| {
        let mut embed = layer::<f32>();
        embed.merge().unwrap();
        let mut parts = embed.into_layer().into_parts();
        change(&mut parts);
        CoreLayer::from_parts(parts).unwrap_err().kind()
    };
    assert_eq!(kind(|parts| parts.enabled = false), ErrorKind::State);
    assert_eq!(kind(|parts| parts.active.push("d".into())), ErrorKind::Adapter);
    assert_eq!(
        kind(|parts| parts.active = vec!["b".into(), "b".into()]),
        ErrorKind::Adapter
    );
    assert_eq!(
        kind(|parts| parts.active = vec!["b".into(), "c".into()]),
        ErrorKind::Overlap
    );
    assert_eq!(
        kind(|parts| parts.merges[0].adapters.push("default".into())),
        ErrorKind::State
    );
    assert_eq!(
        kind(|parts| parts.merges[0].tokens[0].0 = 10),
        ErrorKind::TokenOutOfRange
    );
    assert_eq!(kind(|parts| parts.merges[0].tokens.truncate(1)), ErrorKind::Shape);
    assert_eq!(
        kind(|parts| {
            let (tokens, delta) = parts.adapters.remove(1).into_parts();
            parts
                .adapters
                .push(TokenAdapter::new("c", tokens, delta).unwrap());
        }),
        ErrorKind::Adapter
    );
    assert_eq!(
        kind(|parts| {
            let (_, delta) = parts.adapters.remove(1).into_parts();
            parts
                .adapters
                .push(TokenAdapter::new("d", set(&[1, 2, 3]), delta).unwrap());
        }),
        ErrorKind::Shape
    );
}

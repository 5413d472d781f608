//! What the layer and its head allocate, in all element types: nothing of the size of their table.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use dfdx::prelude::*;
use half::f16;
use trainable_tokens_core::{AdamConfig, Element, EmbeddingSource, Overlap, TokenRows, TokenSet};
use trainable_tokens_dfdx::{DfdxDevice, DfdxElement, TrainableTokens};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const VOCAB_SIZE: usize = 20_000;
const DIM: usize = 256;
/// Hidden states of the head.
const NUM_IDS: usize = 8;

fn values<E: DfdxElement>(rows: usize) -> Vec<E> {
    let value = |at: usize| <E as Element>::from_f64(((at * 31) % 101) as f64 / 101.0 - 0.5);
    (0..rows * DIM).map(value).collect()
}

fn bytes<E: DfdxElement>(layer: &TrainableTokens<E>) -> TokenRows
where
    Cpu: DfdxDevice<E>,
{
    let ids: Vec<_> = layer.tokens().ids().to_vec();
    layer.table().read_rows(&ids).unwrap()
}

fn nothing_of_the_size_of_the_table<E: DfdxElement>()
where
    Cpu: DfdxDevice<E>,
{
    let device = Cpu::default();
    let size = E::DTYPE.size_in_bytes();
    let table = VOCAB_SIZE * DIM * size;
    let weight: Tensor<(usize, usize), E, Cpu> =
        device.tensor_from_vec(values(VOCAB_SIZE), (VOCAB_SIZE, DIM));
    let mut layer = TrainableTokens::from_tensor(weight, &[19_999, 3, 500]).unwrap();
    let mut adam = trainable_tokens_core::Adam::new(AdamConfig::ADAMW).unwrap();
    let mut step = |layer: &mut TrainableTokens<E>| {
        let rows = layer
            .lookup(&[3, 1, 500, 19_999, 3, 7], OwnedTape::default())
            .unwrap();
        let loss: Tensor<(), E, Cpu, _> = rows.square().sum();
        layer.step(&loss.backward(), &mut adam, &mut []).unwrap();
    };
    step(&mut layer);
    let ((), cost) = allocated(|| step(&mut layer)).unwrap();
    assert!(
        cost.total < table / 20,
        "{}, a step: {cost:?} of {table}",
        E::DTYPE
    );

    // The rows have moved, so that the head overrides their columns.
    let hidden: Tensor<(usize, usize), E, Cpu> = device.tensor_from_vec(values(NUM_IDS), (NUM_IDS, DIM));
    let head = || {
        let logits = layer.tied_head().try_forward(hidden.leaky_trace()).unwrap();
        let loss: Tensor<(), E, Cpu, _> = logits.sum();
        drop(loss.backward());
    };
    head();
    let ((), cost) = allocated(head).unwrap();
    // The logits are a thirty-second of it; a backward pass holds several of their size.
    assert!(
        cost.growth < table / 4,
        "{}, the head: {cost:?} of {table}",
        E::DTYPE
    );

    let before = bytes(&layer);
    let ((), cost) = allocated(|| {
        layer.merge().unwrap();
        layer.unmerge().unwrap();
    })
    .unwrap();
    assert!(
        cost.total < table / 20,
        "{}, a merge: {cost:?} of {table}",
        E::DTYPE
    );
    assert!(bytes(&layer).bits_eq(&before));
}

fn nothing_with_several_adapters_either<E: DfdxElement>()
where
    Cpu: DfdxDevice<E>,
{
    let device = Cpu::default();
    let table = VOCAB_SIZE * DIM * E::DTYPE.size_in_bytes();
    let weight: Tensor<(usize, usize), E, Cpu> =
        device.tensor_from_vec(values(VOCAB_SIZE), (VOCAB_SIZE, DIM));
    let mut layer = TrainableTokens::from_tensor(weight, &[19_999, 3, 500]).unwrap();
    for (name, ids) in [("b", [3, 7]), ("c", [12_000, 500])] {
        let rows = TokenRows::new(values::<E>(2), 2, DIM).unwrap();
        let tokens = TokenSet::new(ids, VOCAB_SIZE).unwrap();
        layer.add_adapter_with_rows(name, tokens, &rows).unwrap();
    }
    let names = ["default", "b", "c"];
    layer
        .activate_overlapping(&names, Overlap::WeightedMean(vec![1.0, 2.0, 3.0]))
        .unwrap();
    let mixed = [Some("default"), Some("b"), None, Some("c")];
    let hidden: Tensor<(usize, usize), E, Cpu> = device.tensor_from_vec(values(NUM_IDS), (NUM_IDS, DIM));
    let lookups = || {
        let ids = [3, 1, 500, 19_999, 12_000, 7, 3, 500];
        let rows = layer.lookup(&ids, OwnedTape::default()).unwrap();
        let each = layer.lookup_mixed(&ids, &mixed, OwnedTape::default()).unwrap();
        let loss: Tensor<(), E, Cpu, _> = (rows + each).square().sum();
        drop(loss.backward());
    };
    let heads = || {
        let head = layer.tied_head();
        let logits = head.try_forward(hidden.leaky_trace()).unwrap();
        let each = head.logits_mixed(hidden.leaky_trace(), &mixed).unwrap();
        let loss: Tensor<(), E, Cpu, _> = (logits + each).sum();
        drop(loss.backward());
    };
    lookups();
    let ((), cost) = allocated(lookups).unwrap();
    assert!(
        cost.total < table / 20,
        "{}, lookups: {cost:?} of {table}",
        E::DTYPE
    );
    heads();
    let ((), cost) = allocated(heads).unwrap();
    // Logits of both heads, of the parts of one, and gradients of all of them: each a thirty-second of the table.
    assert!(cost.growth < table, "{}, heads: {cost:?} of {table}", E::DTYPE);
    assert!(
        cost.largest < table / 16,
        "{}, heads: {cost:?} of {table}",
        E::DTYPE
    );
}

/// The one test of this program: the counters are the process's.
#[test]
fn every_element_type() {
    nothing_of_the_size_of_the_table::<f32>();
    nothing_of_the_size_of_the_table::<f64>();
    nothing_of_the_size_of_the_table::<f16>();
    nothing_with_several_adapters_either::<f32>();
    nothing_with_several_adapters_either::<f64>();
    nothing_with_several_adapters_either::<f16>();
}

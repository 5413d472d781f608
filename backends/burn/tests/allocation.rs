//! What the module allocates, in all element types: nothing of the size of its table.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::tensor::{DType, Int, Tensor};
use common::{DTYPES, bytes, device, embedding, noise};
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{
    Adam, AdamConfig, CrossEntropyOptions, LogitsChunk, Overlap, TokenRows, TokenSet,
};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const VOCAB_SIZE: usize = 20_000;
const DIM: usize = 256;
/// Hidden states of the head.
const NUM_IDS: usize = 8;

fn layer(dtype: DType) -> TrainableTokens {
    TrainableTokens::wrap(embedding(VOCAB_SIZE, DIM, dtype), &[19_999, 3, 500]).unwrap()
}

/// The one test of this program: the counters are the process's.
#[test]
fn nothing_of_the_size_of_the_table() {
    one_adapter();
    several_adapters();
    fused_loss();
}

/// The loss costs the logits of a few chunks, whatever the number of its rows.
fn fused_loss() {
    const DIM: usize = 16;
    const CHUNK: usize = 32;
    let options = CrossEntropyOptions {
        chunk: LogitsChunk::rows(CHUNK).unwrap(),
        ..CrossEntropyOptions::default()
    };
    for dtype in DTYPES {
        let layer = TrainableTokens::wrap(embedding(VOCAB_SIZE, DIM, dtype), &[19_999, 3, 500]).unwrap();
        let logits = CHUNK * VOCAB_SIZE * dtype.size().max(4);
        for n in [256i64, 2048] {
            let hidden = noise([usize::try_from(n).unwrap(), DIM], dtype, 3).require_grad();
            let labels = Tensor::<1, Int>::arange(0..n, &device());
            let step = || {
                let head = layer.tied_head();
                let loss = head
                    .cross_entropy(hidden.clone(), labels.clone(), options)
                    .unwrap();
                drop(backward(&loss).unwrap());
            };
            step();
            let ((), cost) = allocated(step).unwrap();
            println!("loss of {n} rows, {dtype:?}: {cost:?}, a chunk has {logits}");
            // The logits of all rows would be 8 and 64 chunks.
            assert!(cost.largest <= logits, "{n} rows, {dtype:?}: {cost:?}");
            assert!(cost.growth <= 3 * logits, "{n} rows, {dtype:?}: {cost:?}");
        }
    }
}

fn several_adapters() {
    for dtype in DTYPES {
        let table = VOCAB_SIZE * DIM * dtype.size();
        let mut layer = layer(dtype);
        for (name, ids) in [("b", [3, 7]), ("c", [12_000, 500])] {
            let rows = TokenRows::new(vec![0.5f32; 2 * DIM], 2, DIM).unwrap();
            let tokens = TokenSet::new(ids, VOCAB_SIZE).unwrap();
            layer.add_adapter_with_rows(name, tokens, &rows).unwrap();
        }
        let names = ["default", "b", "c"];
        let mean = Overlap::WeightedMean(vec![1.0, 2.0, 3.0]);
        layer.activate_overlapping(&names, mean).unwrap();
        let ids = [[3, 1], [500, 19_999], [12_000, 7], [3, 500]];
        let ids = Tensor::<2, Int>::from_data(ids, &device());
        let mixed = [Some("default"), Some("b"), None, Some("c")];
        let lookups = || {
            let rows = layer.forward(ids.clone()) + layer.lookup_mixed(ids.clone(), &mixed).unwrap();
            drop(backward(&rows.square().sum()).unwrap());
        };
        lookups();
        let ((), cost) = allocated(lookups).unwrap();
        assert!(cost.total < table / 20, "{dtype:?}, lookups: {cost:?} of {table}");
        // Not even the table of slots, of 4 bytes for each token, is made again.
        assert!(cost.largest < VOCAB_SIZE * 4, "{dtype:?}, lookups: {cost:?}");

        let hidden = noise([4, NUM_IDS / 4, DIM], dtype, 3).require_grad();
        let heads = || {
            let head = layer.tied_head();
            let logits = head.forward(hidden.clone());
            let each = head.logits_mixed(hidden.clone(), &mixed).unwrap();
            drop(backward(&(logits + each).sum()).unwrap());
        };
        heads();
        let ((), cost) = allocated(heads).unwrap();
        // Logits of both heads, of the parts of one, and gradients of all of them: each a thirty-second of the table.
        assert!(cost.growth < table, "{dtype:?}, heads: {cost:?} of {table}");
        assert!(cost.largest < table / 8, "{dtype:?}, heads: {cost:?} of {table}");

        let before = bytes(&layer.embedding().weight);
        let ((), cost) = allocated(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        })
        .unwrap();
        assert!(cost.total < table / 20, "{dtype:?}, a merge: {cost:?} of {table}");
        assert_eq!(bytes(&layer.embedding().weight), before);
    }
}

fn one_adapter() {
    for dtype in DTYPES {
        let table = VOCAB_SIZE * DIM * dtype.size();
        let mut layer = layer(dtype);
        let ids = Tensor::<2, Int>::from_data([[3, 1, 500, 19_999, 3, 7]], &device());
        let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
        let mut step = |layer: &mut TrainableTokens| {
            let loss = layer.forward(ids.clone()).square().sum();
            let gradients = backward(&loss).unwrap();
            layer.step(&gradients, &mut adam, &mut []).unwrap();
        };
        step(&mut layer);
        let ((), cost) = allocated(|| step(&mut layer)).unwrap();
        assert!(cost.total < table / 20, "{dtype:?}, a step: {cost:?} of {table}");

        let hidden = noise([NUM_IDS, DIM], dtype, 3).require_grad();
        let head = || drop(backward(&layer.tied_head().forward(hidden.clone()).sum()).unwrap());
        head();
        let ((), cost) = allocated(head).unwrap();
        // The logits are a thirty-second of it; a backward pass holds several of their size.
        assert!(
            cost.growth < table / 4,
            "{dtype:?}, the head: {cost:?} of {table}"
        );

        let before = bytes(&layer.embedding().weight);
        let ((), cost) = allocated(|| {
            layer.merge().unwrap();
            layer.unmerge().unwrap();
        })
        .unwrap();
        assert!(cost.total < table / 20, "{dtype:?}, a merge: {cost:?} of {table}");
        assert_eq!(bytes(&layer.embedding().weight), before);

        // Another handle on the table costs one copy of it, once, and keeps its rows.
        let shared = layer.embedding().clone();
        layer
            .set_rows(&TokenRows::new(vec![0.5f64; 3 * DIM], 3, DIM).unwrap())
            .unwrap();
        let ((), cost) = allocated(|| layer.merge().unwrap()).unwrap();
        assert!(
            (table..2 * table).contains(&cost.total),
            "{dtype:?}, a copy: {cost:?} of {table}"
        );
        assert_eq!(bytes(&shared.weight), before);
    }
}

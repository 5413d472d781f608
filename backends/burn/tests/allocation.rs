//! What the module allocates, in all element types: nothing of the size of its table.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use burn::tensor::{DType, Int, Tensor};
use common::{DTYPES, bytes, device, embedding, noise};
use trainable_tokens_burn::{TrainableTokens, backward};
use trainable_tokens_core::{Adam, AdamConfig, TokenRows};
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

//! No step allocates in proportion to the table: measured with a counting allocator.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use common::noise;
use trainable_tokens_candle::{FrozenLinear, TrainableTokens};
use trainable_tokens_core::{Adam, AdamConfig, CrossEntropyOptions, LogitsChunk, Overlap};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;
/// Tests of one binary run side by side, but only one may measure.
static MEASURING: Mutex<()> = Mutex::new(());

/// Runs `work`; what it allocated at most at once, and by one call.
fn measure<R>(what: &str, work: impl FnOnce() -> R) -> (R, usize, usize) {
    let (result, cost) = allocated(work).unwrap();
    println!(
        "{what}: growth {} KiB, largest {} KiB",
        cost.growth >> 10,
        cost.largest >> 10
    );
    (result, cost.growth, cost.largest)
}

const VOCAB: usize = 200_000;
const DIM: usize = 64;
/// Rows of a batch, and of hidden states.
const BATCH: usize = 64;
const HIDDEN: usize = 4;

fn layer(dtype: DType) -> TrainableTokens {
    let tokens: Vec<u32> = (0..50).map(|i| i * 3_999).collect();
    TrainableTokens::from_tensor(noise(&[VOCAB, DIM], dtype, 1), &tokens).unwrap()
}

fn ids() -> Tensor {
    let last = u32::try_from(VOCAB).unwrap() - 1;
    let batch: Vec<u32> = (0..u32::try_from(BATCH).unwrap())
        .map(|i| (i * 3_999 * (1 + i % 2)).min(last))
        .collect();
    Tensor::from_vec(batch, (2, BATCH / 2), &Device::Cpu).unwrap()
}

#[test]
fn a_step_through_the_lookup_costs_the_batch_and_the_rows() {
    let _alone = MEASURING.lock();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (mut layer, ids) = (layer(dtype), ids());
        let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
        let mut step = || {
            let loss = layer.forward(&ids).unwrap().sqr().unwrap().sum_all().unwrap();
            layer.step(&loss.backward().unwrap(), &mut adam, &mut []).unwrap();
        };
        step();
        let ((), growth, largest) = measure(&format!("lookup {dtype:?}"), step);
        let batch_and_rows = (BATCH + 50) * DIM * 4;
        assert!(
            largest <= batch_and_rows,
            "{dtype:?}: one allocation of {largest} bytes"
        );
        assert!(growth <= 12 * batch_and_rows, "{dtype:?}: {growth} bytes at once");
    }
}

#[test]
fn the_head_costs_its_logits() {
    let _alone = MEASURING.lock();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mut layer = layer(dtype);
        let head = layer.tied_head();
        let hidden = Var::from_tensor(&noise(&[HIDDEN, DIM], dtype, 2)).unwrap();
        let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
        let mut step = |layer: &mut TrainableTokens| {
            let loss = head.forward(&hidden).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            assert!(gradients.get(&hidden).is_some());
            layer.step(&gradients, &mut adam, &mut []).unwrap();
        };
        // The rows differ from the base's from the second step on.
        step(&mut layer);
        let ((), growth, largest) = measure(&format!("head {dtype:?}"), || step(&mut layer));
        let logits = HIDDEN * VOCAB * 4;
        assert!(largest <= logits, "{dtype:?}: one allocation of {largest} bytes");
        assert!(growth <= 5 * logits, "{dtype:?}: {growth} bytes at once");
    }
}

#[test]
fn several_adapters_cost_the_batch_and_their_rows() {
    let _alone = MEASURING.lock();
    for dtype in [DType::F32, DType::BF16] {
        let mut layer = layer(dtype);
        let other: Vec<u32> = (0..50).map(|i| i * 3_999 + i % 2).collect();
        layer.add_adapter("other", &other).unwrap();
        let ids = ids();
        let mut adam = ["default", "other"].map(|name| (name, Adam::new(AdamConfig::ADAMW).unwrap()));
        let weights = Overlap::WeightedMean(vec![1.0, 3.0]);
        for mixed in [None, Some([Some("default"), Some("other")])] {
            layer
                .activate_overlapping(&["default", "other"], weights.clone())
                .unwrap();
            let mut step = || {
                let rows = match mixed {
                    None => layer.forward(&ids).unwrap(),
                    Some(names) => layer.lookup_mixed(&ids, &names).unwrap(),
                };
                let gradients = rows.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                for (name, adam) in &mut adam {
                    let mut adapter = layer.adapter_mut(name).unwrap();
                    adapter.step(&gradients, adam, &mut []).unwrap();
                }
            };
            step();
            let ((), growth, largest) = measure(&format!("adapters {dtype:?} {mixed:?}"), step);
            let rows = (BATCH + 100) * DIM * 4;
            // A mixed batch's plan has a slot, of four bytes, for each token of the vocabulary.
            let slots = if mixed.is_some() { VOCAB * 4 } else { 0 };
            assert!(
                largest <= rows.max(slots),
                "{dtype:?}: one allocation of {largest} bytes"
            );
            assert!(growth <= 16 * rows + slots, "{dtype:?}: {growth} bytes at once");
        }
    }
}

#[test]
fn a_mixed_head_costs_its_logits() {
    let _alone = MEASURING.lock();
    let mut layer = layer(DType::F32);
    layer.add_adapter("other", &[5, 8]).unwrap();
    let head = layer.tied_head();
    let hidden = Var::from_tensor(&noise(&[HIDDEN, DIM], DType::F32, 2)).unwrap();
    let names = [Some("default"), None, Some("other"), Some("other")];
    let ((), growth, largest) = measure("mixed head", || {
        let loss = head.logits_mixed(&hidden, &names).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        for name in ["default", "other"] {
            layer.adapter(name).unwrap().gradient(&gradients).unwrap();
        }
    });
    let logits = HIDDEN * VOCAB * 4;
    assert!(largest <= logits, "one allocation of {largest} bytes");
    assert!(growth <= 6 * logits, "{growth} bytes at once");
}

#[test]
fn a_frozen_linear_layer_makes_no_gradient_of_its_weight() {
    let _alone = MEASURING.lock();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let layer = FrozenLinear::new(noise(&[VOCAB, DIM], dtype, 1), None).unwrap();
        let x = Var::from_tensor(&noise(&[HIDDEN, DIM], dtype, 2)).unwrap();
        let ((), growth, largest) = measure(&format!("linear {dtype:?}"), || {
            let gradients = layer.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
            assert!(gradients.get(&x).is_some());
        });
        let result = HIDDEN * VOCAB * 4;
        assert!(largest <= result, "{dtype:?}: one allocation of {largest} bytes");
        assert!(growth <= 5 * result, "{dtype:?}: {growth} bytes at once");
    }
}

#[test]
fn the_fused_loss_costs_blocks_of_logits() {
    /// Sizes at which logits outweigh all else.
    const VOCAB: usize = 20_000;
    const DIM: usize = 16;
    const CHUNK: usize = 32;
    /// At most so many rows of hidden states are multiplied with so many of the table at once, in up to so many threads.
    const BLOCK: [usize; 3] = [512, 2048, 8];
    let _alone = MEASURING.lock();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let tokens: Vec<u32> = (0..20).map(|i| i * 999).collect();
        let mut layer = TrainableTokens::from_tensor(noise(&[VOCAB, DIM], dtype, 1), &tokens).unwrap();
        let rows = trainable_tokens_core::TokenRows::zeros(trainable_tokens_core::DType::F32, 20, DIM);
        layer.set_rows(&rows).unwrap();
        let head = layer.tied_head();
        let by_rows = CrossEntropyOptions {
            chunk: LogitsChunk::rows(CHUNK).unwrap(),
            ..CrossEntropyOptions::default()
        };
        for (options, rows) in [(by_rows, CHUNK), (CrossEntropyOptions::default(), BLOCK[0])] {
            for n in [256u32, 2048] {
                let hidden = Var::from_tensor(&noise(&[n as usize, DIM], dtype, 2)).unwrap();
                let labels = Tensor::arange(0, n, &Device::Cpu).unwrap();
                let loss = || head.cross_entropy(&hidden, &labels, options).unwrap();
                let step = || drop(loss().backward().unwrap());
                step();
                let evaluate = || drop(head.evaluate_cross_entropy(&hidden, &labels, options).unwrap());
                // The logits of all rows would be 20 and 160 MB. Beside the blocks there are rows of a half-precision
                // table that are widened, hidden states and their gradients: 128 KiB each for the many.
                let block = rows.min(n as usize) * BLOCK[1] * 4;
                for ((), growth, largest) in [
                    measure(&format!("loss of {n} rows, {dtype:?}"), step),
                    measure(&format!("evaluated, {n} rows, {dtype:?}"), evaluate),
                ] {
                    assert!(largest <= block, "{dtype:?}: one allocation of {largest} bytes");
                    let most = BLOCK[2] * block + (1 << 20);
                    assert!(growth <= most, "{dtype:?}: {growth} bytes at once");
                }
            }
        }
    }
}

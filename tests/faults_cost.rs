//! The faults of PEFT's Trainable Tokens that are about cost, F1 and F18; the others are in `faults.rs`. The counters are
//! the process's, so these tests have a process of their own and run one by one.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use ndarray::Array2;
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{Adam, AdamConfig, DType, HostTable, Int8Table, TokenId, TokenRows, TokenSet};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// PEFT copies the table each forward and makes a dense gradient of it: at V = 256000 and D = 2304 a step takes 1.2 s and
/// 2.5 GB. Here what a step allocates does not depend on V.
#[test]
fn f01_a_step_costs_nothing_of_the_vocabulary() {
    let _alone = alone();
    let cost = |v: usize| {
        let table = NdTable::new(Array2::<f32>::zeros((v, 64))).unwrap();
        let last = u32::try_from(v - 1).unwrap();
        let mut layer = TrainableTokens::new(table, TokenSet::new([last, 7], v).unwrap()).unwrap();
        let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
        let ((), cost) = allocated(|| {
            let plan = layer.plan(&[7, 3, last, 7]).unwrap();
            let rows: Array2<f32> = layer.lookup_planned(&plan).unwrap();
            let gradients = layer.backward(&plan, rows.view()).unwrap();
            layer.step(&gradients, &mut adam, &mut []).unwrap();
        })
        .unwrap();
        cost
    };
    let (small, large) = (cost(1_000), cost(100_000));
    assert!(large.largest < 64 * 1024, "{large:?}");
    assert!(large.total <= small.total + 1024, "{small:?} {large:?}");
}

/// PEFT raises for a quantised table. Here only rows that are looked up are dequantised, and trained rows keep their
/// precision.
#[test]
fn f18_quantised_tables_work() {
    const V: usize = 50_000;
    const D: usize = 64;
    let _alone = alone();
    let values: Vec<i8> = (0..V * D)
        .map(|at| i8::try_from(at % 255).unwrap_or(-1))
        .collect();
    let table = Int8Table::new(values, vec![0.01; V], D, DType::F32).unwrap();
    let rows = TokenRows::new(vec![0.123_456_7f32; D], 1, D).unwrap();
    let tokens = TokenSet::new([7], V).unwrap();
    let layer: TrainableTokens<_> = TrainableTokens::with_rows(table, tokens, &rows).unwrap();
    let (out, cost) = allocated(|| layer.lookup(&[49_999, 7]).unwrap()).unwrap();
    let mut want = vec![0f32; D];
    layer
        .source()
        .row(TokenId(49_999))
        .unwrap()
        .decode_into(&mut want);
    assert_eq!(out.row(0).to_vec(), want);
    assert!(out.row(1).iter().all(|x| x.to_bits() == 0.123_456_7f32.to_bits()));
    assert!(cost.total < 8 * 1024, "{cost:?}");
}

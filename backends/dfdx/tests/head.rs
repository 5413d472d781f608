//! The tied head: bit-equal while untrained, a gradient of nothing but the hidden states and the rows.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use common::{assert_close, bits, noise};
use dfdx::nn::Module;
use dfdx::shapes::HasShape;
use dfdx::tensor::{Cpu, NoneTape, OwnedTape, Tensor, TensorFromVec, Trace};
use dfdx::tensor_ops::{Backward, Device, PermuteTo, ReshapeTo, SumTo, TryAdd, TryMatMul, TryMul};
use half::f16;
use trainable_tokens_core::{
    Backend, BackendError, DType, Element, ErrorKind, LayerOptions, LookupPlan, RowTransform, TokenRows,
    TokenSet,
};
use trainable_tokens_dfdx::{Dfdx, DfdxDevice, DfdxElement, TrainableTokens};

const TOKENS: [u32; 2] = [7, 2];

type Matrix<E> = Tensor<(usize, usize), E, Cpu>;

fn layer<E: DfdxElement>() -> TrainableTokens<E>
where
    Cpu: DfdxDevice<E>,
{
    TrainableTokens::from_tensor(noise::<E>(10, 4, 1), &TOKENS).unwrap()
}

/// dfdx's own product with a table.
fn product<E: DfdxElement>(hidden: &Matrix<E>, table: &Matrix<E>) -> Matrix<E>
where
    Cpu: Device<E>,
{
    hidden
        .clone()
        .try_matmul(table.clone().permute::<(usize, usize), _>())
        .unwrap()
}

fn tolerance<E: Element>() -> f64 {
    match E::DTYPE {
        DType::F64 => 1e-12,
        DType::F32 => 2e-5,
        _ => 1e-2,
    }
}

fn values<E: DfdxElement, T>(tensor: &Tensor<(usize, usize), E, Cpu, T>) -> Vec<f64> {
    tensor.as_vec().into_iter().map(Element::to_f64).collect()
}

#[test]
fn untrained_rows_are_a_no_op_to_the_last_bit() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        // Products of other shapes sum long rows in another order.
        for (vocab, dim) in [(10, 4), (100, 1_300), (1_210, 1_300), (5_000, 64)] {
            let table = noise::<E>(vocab, dim, 1);
            let embed = TrainableTokens::from_tensor(table.clone(), &[7, 2, 9]).unwrap();
            for rows in [1, 5, 70] {
                let hidden = noise::<E>(rows, dim, 2);
                let got = embed.tied_head().logits(hidden.clone()).unwrap();
                assert!(
                    bits(&got) == bits(&product(&hidden, &table)),
                    "{vocab} x {dim}, {rows}"
                );
                let strided = noise::<E>(dim, rows, 2).permute::<(usize, usize), _>();
                let got = embed.tied_head().logits(strided.clone()).unwrap();
                assert!(
                    bits(&got) == bits(&product(&strided, &table)),
                    "{vocab} x {dim}, {rows} strided"
                );
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn trained_rows_replace_their_columns() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let mut embed = layer::<E>();
        let mut rows = embed.rows().unwrap();
        rows.scale(-2.0);
        embed.set_rows(&rows).unwrap();
        let hidden = noise::<E>(3, 4, 3);
        let live = embed.tied_head().logits(hidden.clone()).unwrap();
        embed.merge().unwrap();
        let merged = embed.tied_head().logits(hidden.clone()).unwrap();
        assert_close("merged", &values(&live), &values(&merged), tolerance::<E>());
        embed.unmerge().unwrap();
        let frozen = product(&hidden, embed.table().tensor());
        for (row, frozen) in values(&live).chunks(10).zip(values(&frozen).chunks(10)) {
            for (column, (live, frozen)) in row.iter().zip(frozen).enumerate() {
                let trained = TOKENS.iter().any(|id| *id as usize == column);
                assert_eq!(trained, live != frozen, "column {column}");
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn lookup_and_head_on_one_tape() {
    // The gradient of sum(logits * upstream) against differences, through lookup and head at once.
    let embed = layer::<f64>();
    let ids = [7, 1, 2, 7];
    let upstream = noise::<f64>(4, 10, 5);
    let loss = |embed: &TrainableTokens<f64>| {
        let hidden = embed.lookup(&ids, OwnedTape::default()).unwrap();
        let logits = embed.tied_head().logits(hidden).unwrap();
        logits.try_mul(upstream.clone()).unwrap().sum::<(), _>()
    };
    let gradient = embed.gradient(&loss(&embed).backward()).unwrap().to_f64_vec();
    let start = embed.rows().unwrap().to_f64_vec();
    for at in 0..8 {
        let moved = |by: f64| {
            let mut rows = start.clone();
            rows[at] += by;
            let mut embed = layer::<f64>();
            embed.set_rows(&TokenRows::new(rows, 2, 4).unwrap()).unwrap();
            loss(&embed).as_vec()[0]
        };
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!(
            (difference - gradient[at]).abs() < 1e-7,
            "{at}: {difference} {}",
            gradient[at]
        );
    }
}

#[test]
fn hidden_states_get_the_gradient_of_dfdxs_own_product() {
    fn check<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let embed = layer::<E>();
        let upstream = noise::<E>(3, 10, 5);
        // A strided leaf: its gradient has its strides.
        let leaf = noise::<E>(4, 3, 3).permute::<(usize, usize), _>();
        let logits = embed.tied_head().logits(leaf.leaky_trace()).unwrap();
        let loss = logits
            .try_mul(upstream.clone())
            .unwrap()
            .try_sum::<(), _>()
            .unwrap();
        let got = loss.try_backward().unwrap().get(&leaf);
        let table = embed.table().tensor().clone().permute::<(usize, usize), _>();
        let own = leaf.leaky_trace().try_matmul(table).unwrap();
        let loss = own.try_mul(upstream).unwrap().try_sum::<(), _>().unwrap();
        let want = loss.try_backward().unwrap().get(&leaf);
        assert_close("hidden", &values(&got), &values(&want), tolerance::<E>());
    }
    check::<f32>();
    check::<f64>();
    check::<f16>();
}

#[test]
fn a_bias_is_kept_and_stays_frozen() {
    let embed = layer::<f32>();
    let dev = Cpu::default();
    let bias: Tensor<(usize,), f32, Cpu> = dev.tensor_from_vec(noise::<f32>(1, 10, 9).as_vec(), (10,));
    let hidden = noise::<f32>(3, 4, 3);
    let plain = embed.tied_head().logits(hidden.clone()).unwrap();
    let repeated = dev.tensor_from_vec(bias.as_vec().repeat(3), (3, 10));
    let want = plain.try_add(repeated).unwrap();
    let head = embed.tied_head().with_bias(bias.clone()).unwrap();
    let got = head.logits(hidden.leaky_trace()).unwrap();
    assert_eq!(bits(&got), bits(&want));
    let mut gradients = got.sum::<(), _>().backward();
    assert!(
        gradients
            .get_or_alloc_mut(&bias)
            .unwrap()
            .iter()
            .all(|x| *x == 0.0)
    );
    let short: Tensor<(usize,), f32, Cpu> = dev.tensor_from_vec(vec![0.0; 9], (9,));
    assert_eq!(
        embed.tied_head().with_bias(short).unwrap_err().kind(),
        ErrorKind::Shape
    );
}

#[test]
fn hidden_states_of_two_and_three_dimensions() {
    let embed = layer::<f32>();
    let head = embed.tied_head();
    let hidden = noise::<f32>(6, 4, 3);
    let want = head.forward(hidden.clone());
    let deep = hidden.reshape_like(&(2, 3, 4));
    let got = head.forward(deep.leaky_trace());
    assert_eq!(got.shape(), &(2, 3, 10));
    assert_eq!(bits(&got), bits(&want));
    let gradients = got.sum::<(), _>().backward();
    assert_eq!(gradients.get(&deep).shape(), &(2, 3, 4));
    assert_eq!(embed.gradient(&gradients).unwrap().shape(), [2, 4]);
}

#[test]
fn an_empty_batch_has_a_zero_gradient() {
    let embed = layer::<f32>();
    let empty: Matrix<f32> = Cpu::default().tensor_from_vec(vec![], (0, 4));
    let logits = embed.tied_head().logits(empty.leaky_trace()).unwrap();
    assert_eq!(logits.shape(), &(0, 10));
    let one = embed.lookup(&[1], OwnedTape::default()).unwrap();
    let (logits, tape) = dfdx::tensor::SplitTape::split_tape(logits);
    assert!(logits.shape().0 == 0);
    let (one, other) = dfdx::tensor::SplitTape::split_tape(one);
    let tape = dfdx::tensor::Merge::merge(tape, other);
    let gradients = dfdx::tensor::PutTape::put_tape(one, tape)
        .sum::<(), _>()
        .backward();
    assert_eq!(embed.gradient(&gradients).unwrap().to_f64_vec(), [0.0; 8]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let embed = layer::<f32>();
    let wide = noise::<f32>(2, 5, 1);
    assert_eq!(
        embed.tied_head().logits(wide).unwrap_err().kind(),
        ErrorKind::Shape
    );

    // Through the backend's own functions: tokens of another table or of other rows.
    let (table, delta) = (embed.table(), embed.delta().unwrap());
    for (tokens, vocab) in [(&[7, 2][..], 11), (&[7], 10)] {
        let tokens = TokenSet::new(tokens.iter().copied(), vocab).unwrap();
        let hidden = noise::<f32>(2, 4, 1).leaky_trace();
        let error = Dfdx::logits(hidden, table, Some(delta), &tokens).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shape);
    }
    for (tokens, vocab, id, kind) in [
        (&[7, 2][..], 20, 15, ErrorKind::TokenOutOfRange),
        (&[7, 2, 3], 10, 3, ErrorKind::Shape),
    ] {
        let tokens = TokenSet::new(tokens.iter().copied(), vocab).unwrap();
        let plan = LookupPlan::new(&tokens, LayerOptions::default(), &[id]).unwrap();
        let error = Dfdx::lookup(table, Some(delta), &plan, RowTransform::default()).unwrap_err();
        assert_eq!(error.kind(), kind);
    }
}

#[test]
fn inference_needs_no_tape() {
    let embed = layer::<f32>();
    let hidden = embed.lookup(&[7, 1], NoneTape).unwrap();
    assert_eq!(embed.tied_head().logits(hidden).unwrap().shape(), &(2, 10));
}

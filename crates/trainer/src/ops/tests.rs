//! Each operation's gradient against finite differences, and against the composition that other devices run.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::attention::{AttentionKind, Mask, Rotation, attention, composed, softmax};
use super::frozen::{add_frozen, mul_frozen};
use super::gate::{activate, composed as composed_activation, gate};
use super::norm::Norm;
use super::recompute::recompute;
use crate::config::Activation;

type Operation<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Numbers without a pattern, between -1 and 1.
fn noise(shape: &[usize], seed: f64) -> Tensor {
    let values = (0..shape.iter().product()).map(|at| ((at as f64 + 1.0) * (1.7 + seed)).sin());
    Tensor::from_iter(values, &Device::Cpu)
        .unwrap()
        .reshape(shape)
        .unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The gradients of `sum(f(operands) * w)` in all operands.
fn gradients(f: Operation<'_>, operands: &[Tensor]) -> Vec<Vec<f64>> {
    let operands: Vec<Var> = operands.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = operands.iter().map(|x| x.as_tensor().clone()).collect();
    let out = f(&tensors).unwrap();
    let w = noise(out.dims(), 0.3).to_dtype(out.dtype()).unwrap();
    let gradients = (out * w).unwrap().sum_all().unwrap().backward().unwrap();
    tensors
        .iter()
        .map(|x| values(gradients.get(x).unwrap()))
        .collect()
}

/// The gradients against central differences, in `f64`.
fn matches_finite_differences(f: Operation<'_>, operands: &[Tensor]) {
    let loss = |operands: &[Tensor]| {
        let out = f(operands).unwrap();
        let w = noise(out.dims(), 0.3);
        (out * w).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    for (which, gradient) in gradients(f, operands).iter().enumerate() {
        for (at, analytic) in gradient.iter().enumerate() {
            let nudged = |by: f64| {
                let mut operands = operands.to_vec();
                let mut numbers = values(&operands[which]);
                numbers[at] += by;
                operands[which] = Tensor::from_vec(numbers, operands[which].shape(), &Device::Cpu).unwrap();
                loss(&operands)
            };
            let slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5;
            assert!(
                (slope - analytic).abs() < 1e-8,
                "operand {which}, element {at}: {slope} {analytic}"
            );
        }
    }
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * want.abs().max(1.0),
            "element {at}: {got} {want}"
        );
    }
}

/// Result and gradients against another form of the operation, in every element type. The oracle computes in `f64`.
fn matches(f: Operation<'_>, oracle: Operation<'_>, operands: &[Tensor]) {
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 1e-5),
        (DType::BF16, 4e-2),
        (DType::F16, 5e-3),
    ] {
        let narrow: Vec<Tensor> = operands.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let wide: Vec<Tensor> = narrow.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
        let got = f(&narrow).unwrap();
        assert_eq!(got.dtype(), dtype);
        assert_close(&values(&got), &values(&oracle(&wide).unwrap()), tolerance);
        let pairs = gradients(f, &narrow).into_iter().zip(gradients(oracle, &wide));
        pairs.for_each(|(got, want)| assert_close(&got, &want, tolerance * 4.0));
    }
}

const ACTIVATIONS: [Activation; 4] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
];

fn silu_gate(x: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate(Activation::Silu, x, up)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let weight = weight.clone();
    Norm::RootMeanSquare { weight, eps }.forward(x)
}

/// All kinds of norm, with weights for an operand: of its type, or for Gemma's in at least `f32`.
fn norms(weight: &Tensor, operand: &Tensor) -> [Norm; 3] {
    let (narrow, eps) = (like(weight, operand), 1e-3);
    let wide = narrow.to_dtype(super::working_dtype(narrow.dtype())).unwrap();
    let bias = (&narrow * 0.3).unwrap();
    [
        Norm::RootMeanSquare {
            weight: narrow.clone(),
            eps,
        },
        Norm::RootMeanSquare { weight: wide, eps },
        Norm::Layer {
            weight: narrow,
            bias,
            eps,
        },
    ]
}

/// A weight of the element type of its operand.
fn like(weight: &Tensor, operand: &Tensor) -> Tensor {
    weight.to_dtype(operand.dtype()).unwrap()
}

fn kind(mask: Mask, softcap: Option<f64>, rotates: bool, [length, head_dim]: [usize; 2]) -> AttentionKind {
    let angles = noise(&[length, head_dim], 0.9);
    AttentionKind {
        query_heads: 4,
        key_heads: 2,
        scale: 0.7,
        softcap,
        mask,
        lengths: None,
        rotation: rotates.then(|| Rotation {
            cos: angles.cos().unwrap(),
            sin: angles.sin().unwrap(),
        }),
    }
}

/// Kinds of attention, and queries, keys and values of 2 examples for each: once of all positions, once with queries of
/// the last ones only.
fn attentions([length, head_dim]: [usize; 2]) -> Vec<(AttentionKind, Vec<Tensor>)> {
    let kinds = [
        (Mask::causal(None), None, true),
        (Mask::causal(Some(3)), Some(1.5), true),
        (Mask::causal(Some(1)), None, false),
        (Mask::ALL, None, false),
    ];
    let kinds = kinds.map(|(mask, cap, rotates)| kind(mask, cap, rotates, [length, head_dim]));
    let operands = |queries: usize| -> Vec<Tensor> {
        let shapes = [(queries, 4, 0.1), (length, 2, 0.5), (length, 2, 0.7)];
        let tensors = shapes.map(|(length, heads, seed)| noise(&[2, length, heads * head_dim], seed));
        tensors.into()
    };
    // Padding behind the second example.
    let padded = [&kinds[0], &kinds[3]].map(|kind| AttentionKind {
        lengths: Some([length, length - 2].into()),
        ..kind.clone()
    });
    let of_last = length / 2 - 1;
    let kinds = kinds.into_iter().chain(padded);
    kinds
        .flat_map(|kind| [length, of_last].map(|queries| (kind.clone(), operands(queries))))
        .collect()
}

/// A kind with angles of the element type of its operand.
fn kind_like(kind: &AttentionKind, operand: &Tensor) -> AttentionKind {
    let mut kind = kind.clone();
    kind.rotation = kind.rotation.map(|rotation| Rotation {
        cos: like(&rotation.cos, operand),
        sin: like(&rotation.sin, operand),
    });
    kind
}

#[test]
fn gradients_are_the_slopes() {
    let both = [noise(&[2, 3], 0.0), noise(&[2, 3], 0.4)];
    let x = &both[..1];
    let weight = Tensor::new(&[1.5f64, 0.5, -2.0], &Device::Cpu).unwrap();
    matches_finite_differences(&|x| softmax(&x[0]), x);
    for norm in norms(&weight, &weight) {
        matches_finite_differences(&|x| norm.forward(&x[0]), x);
        matches_finite_differences(&|x| norm.composed(&x[0]), x);
    }
    for activation in ACTIVATIONS {
        matches_finite_differences(&|x| gate(activation, &x[0], &x[1]), &both);
        matches_finite_differences(&|x| activate(activation, &x[0]), x);
        matches_finite_differences(&|x| composed_activation(activation, &x[0]), x);
    }
    matches_finite_differences(&|x| mul_frozen(&x[0], &weight), x);
    matches_finite_differences(&|x| add_frozen(&x[0].sqr()?, &weight), x);
    matches_finite_differences(
        &|x| mul_frozen(&x[0].t()?.sqr()?, &weight.narrow(0, 0, 2)?)?.t(),
        x,
    );
    for (kind, operands) in attentions([5, 4]) {
        matches_finite_differences(&|x| attention(&x[0], &x[1], &x[2], &kind), &operands);
    }
}

#[test]
fn the_norms_are_their_compositions() {
    // Enough rows for several threads, and a width that no vector divides.
    for shape in [[2, 3], [5000, 70]] {
        let (x, weight) = (noise(&shape, 0.0), noise(&shape[1..], 0.2));
        for kind in 0..3 {
            matches(
                &|x| norms(&weight, &x[0])[kind].forward(&x[0]),
                &|x| norms(&weight, &x[0])[kind].composed(&x[0]),
                std::slice::from_ref(&x),
            );
        }
    }
}

#[test]
fn activations_are_their_compositions() {
    for shape in [[2, 3], [5000, 70]] {
        // Far enough from zero to see where they are flat.
        let operands = [(noise(&shape, 0.0) * 6.0).unwrap(), noise(&shape, 0.2)];
        for activation in ACTIVATIONS {
            matches(
                &|x| gate(activation, &x[0], &x[1]),
                &|x| composed_activation(activation, &x[0])? * &x[1],
                &operands,
            );
            matches(
                &|x| activate(activation, &x[0]),
                &|x| composed_activation(activation, &x[0]),
                &operands[..1],
            );
        }
    }
}

/// Half types: Gemma's norm rounds once, Llama's also before the weight.
#[test]
fn the_norms_round_where_transformers_rounds() {
    let x = noise(&[64, 48], 0.0).to_dtype(DType::BF16).unwrap();
    let weight = noise(&[48], 0.2);
    let [llama, gemma, _] = norms(&weight, &x).map(|norm| {
        let out = norm.forward(&x).unwrap();
        assert_eq!(values(&out), values(&norm.composed(&x).unwrap()));
        values(&out)
    });
    assert_ne!(llama, gemma);
}

#[test]
fn attention_is_its_composition() {
    // One block of positions, and several, the last not full.
    for length in [5, 150] {
        for (kind, operands) in attentions([length, 8]) {
            matches(
                &|x| attention(&x[0], &x[1], &x[2], &kind_like(&kind, &x[0])),
                &|x| composed(&x[0], &x[1], &x[2], &kind_like(&kind, &x[0])),
                &operands,
            );
        }
    }
}

#[test]
fn strided_operands_are_taken_as_they_read() {
    let x = noise(&[3, 2], 0.0);
    let weight = noise(&[3], 0.2);
    let run = |x: &Tensor| values(&rms_norm(x, &weight, 1e-3).unwrap());
    assert_eq!(run(&x.t().unwrap()), run(&x.t().unwrap().contiguous().unwrap()));
    let run = |x: &Tensor| values(&silu_gate(x, x).unwrap());
    assert_eq!(run(&x.t().unwrap()), run(&x.t().unwrap().contiguous().unwrap()));
    // A gradient that arrives transposed.
    let through = |f: Operation<'_>| gradients(&|x| f(x)?.t(), &[noise(&[2, 3], 0.0)]);
    let apart = |f: Operation<'_>| gradients(&|x| f(x)?.t()?.contiguous(), &[noise(&[2, 3], 0.0)]);
    let norm: Operation<'_> = &|x| rms_norm(&x[0], &weight, 1e-3);
    assert_eq!(through(norm), apart(norm));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (kind, operands) = attentions([5, 4]).swap_remove(0);
    let [query, key, value] = [0, 1, 2].map(|at| &operands[at]);
    let error = attention(query, key, &value.narrow(1, 0, 4).unwrap(), &kind).unwrap_err();
    assert!(
        error.to_string().contains("[2, 4, 8], expected [2, 5, 8]"),
        "{error}"
    );
    let error = attention(query, &key.narrow(1, 0, 4).unwrap(), value, &kind).unwrap_err();
    assert!(error.to_string().contains("5 queries"), "{error}");
    let error = attention(&query.narrow(2, 0, 15).unwrap(), key, value, &kind).unwrap_err();
    assert!(error.to_string().contains("width 15"), "{error}");
    for lengths in [&[5][..], &[5, 6], &[5, 0]] {
        let kind = AttentionKind {
            lengths: Some(lengths.into()),
            ..kind.clone()
        };
        let error = attention(query, key, value, &kind).unwrap_err();
        assert!(error.to_string().contains("2 examples of 5 positions"), "{error}");
    }
    let error = attention(query, &key.to_dtype(DType::F32).unwrap(), value, &kind).unwrap_err();
    assert!(error.to_string().contains("F32"), "{error}");
    let error = silu_gate(query, key).unwrap_err();
    assert!(
        error.to_string().contains("[2, 5, 16] does not fit [2, 5, 8]"),
        "{error}"
    );
    let error = rms_norm(query, &noise(&[15], 0.1), 1e-3).unwrap_err();
    assert!(error.to_string().contains("width 15"), "{error}");
    assert!(rms_norm(&query.to_dtype(DType::U32).unwrap(), &noise(&[16], 0.1), 1e-3).is_err());
}

#[test]
fn the_frozen_operand_gets_no_gradient() {
    type Frozen = fn(&Tensor, &Tensor) -> Result<Tensor>;
    let x = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let frozen = Var::new(&[3f32, 4.0], &Device::Cpu).unwrap();
    for operation in [mul_frozen as Frozen, |x, weight| rms_norm(x, weight, 1e-6)] {
        let out = operation(x.as_tensor(), frozen.as_tensor()).unwrap();
        let gradients = out.sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(frozen.as_tensor()).is_none());
        assert!(gradients.get(x.as_tensor()).is_some());
    }
}

/// A block with leaves, of which the second is used twice.
fn block(x: &Tensor, leaves: &[Tensor]) -> Result<Tensor> {
    let mixed = x.matmul(&leaves[0])?.tanh()?;
    mixed.matmul(&leaves[1])?.broadcast_add(&leaves[1].sum(0)?)? + x
}

#[test]
fn recomputation_changes_nothing() {
    let operands = [noise(&[3, 4], 0.0), noise(&[4, 2], 0.2), noise(&[2, 4], 0.6)];
    let again = |x: &[Tensor]| {
        let leaves = x[1..].to_vec();
        recompute(&x[0], &x[1..], Arc::new(move |x: &Tensor| block(x, &leaves)))
    };
    matches_finite_differences(&again, &operands);
    let plain = |x: &[Tensor]| block(&x[0], &x[1..]);
    assert_eq!(gradients(&again, &operands), gradients(&plain, &operands));
    assert_eq!(
        values(&again(&operands).unwrap()),
        values(&plain(&operands).unwrap())
    );
    // Without leaves.
    let again = |x: &[Tensor]| recompute(&x[0], &[], Arc::new(|x: &Tensor| x.sqr()?.tanh()));
    let plain = |x: &[Tensor]| x[0].sqr()?.tanh();
    assert_eq!(
        gradients(&again, &operands[..1]),
        gradients(&plain, &operands[..1])
    );
}

#[test]
fn an_operation_on_tensors_without_a_graph_keeps_none() {
    let x = noise(&[2, 3], 0.0);
    let weight = noise(&[3], 0.2);
    assert!(!rms_norm(&x, &weight, 1e-3).unwrap().track_op());
    assert!(!silu_gate(&x, &x).unwrap().track_op());
    assert!(
        !recompute(&x, &[], Arc::new(|x: &Tensor| x.sqr()))
            .unwrap()
            .track_op()
    );
    let (kind, operands) = attentions([5, 4]).swap_remove(0);
    let out = attention(&operands[0], &operands[1], &operands[2], &kind).unwrap();
    assert!(!out.track_op());
}

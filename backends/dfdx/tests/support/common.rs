//! What the tests share.
#![allow(dead_code)]

use dfdx::shapes::Shape;
use dfdx::tensor::{Cpu, Tensor, TensorFromVec};
use trainable_tokens_core::{Element, TokenRows};
use trainable_tokens_dfdx::DfdxElement;

/// The elements of a tensor as little-endian bytes.
pub(crate) fn bits<S: Shape, E: DfdxElement, T>(tensor: &Tensor<S, E, Cpu, T>) -> Vec<u8> {
    let values = tensor.as_vec();
    let len = values.len();
    TokenRows::new(values, 1, len).unwrap().to_le_bytes()
}

/// Deterministic values of the size of one, exact in no type in particular.
pub(crate) fn noise<E: DfdxElement>(rows: usize, dim: usize, seed: usize) -> Tensor<(usize, usize), E, Cpu> {
    let value = |i: usize| {
        let noise = u32::try_from(((i + 1) * 7919 + seed * 104_729) % 100_003).unwrap();
        <E as Element>::from_f64((f64::from(noise) / 50_001.5 - 1.0) * 0.9)
    };
    let values = (0..rows * dim).map(value).collect();
    Cpu::default().try_tensor_from_vec(values, (rows, dim)).unwrap()
}

/// Asserts that two sets of values agree within a tolerance relative to the largest of them.
pub(crate) fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let scale = want.iter().fold(1f64, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let close = (got - want).abs() <= tolerance * scale;
        assert!(
            close,
            "{what}: value {i} is {got}, expected {want} (largest {scale})"
        );
    }
}

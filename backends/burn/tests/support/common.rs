//! What the tests share.
#![allow(dead_code)]

use burn::module::Module;
use burn::nn::{Embedding, Linear, LinearConfig};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use trainable_tokens_core::{Element, TokenRows};

pub(crate) const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

pub(crate) fn device() -> Device {
    Device::flex().autodiff()
}

/// The elements of a tensor as bytes.
pub(crate) fn bytes<const D: usize>(tensor: &Tensor<D>) -> Vec<u8> {
    tensor.to_data().as_bytes().to_vec()
}

/// The elements of a tensor of any float type, in `f64`.
pub(crate) fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().try_into_vec_as().unwrap()
}

/// Deterministic values of the size of one, exact in no type in particular.
pub(crate) fn noise<const D: usize>(shape: [usize; D], dtype: DType, seed: usize) -> Tensor<D> {
    let len = shape.iter().product::<usize>();
    let value = |i: usize| {
        let noise = u32::try_from(((i + 1) * 7919 + seed * 104_729) % 100_003).unwrap();
        (f64::from(noise) / 50_001.5 - 1.0) * 0.9
    };
    let data = TensorData::new((0..len).map(value).collect::<Vec<f64>>(), shape);
    Tensor::from_data(data, (&device(), dtype))
}

/// An embedding over [`noise`].
pub(crate) fn embedding(vocab_size: usize, dim: usize, dtype: DType) -> Embedding {
    let weight = burn::module::Param::from_tensor(noise([vocab_size, dim], dtype, 1));
    Embedding { weight }
}

/// A frozen linear layer over [`noise`].
pub(crate) fn linear(inputs: usize, outputs: usize) -> Linear {
    let layer = LinearConfig::new(inputs, outputs)
        .with_bias(false)
        .init(&device());
    let weight = layer.weight.map(|_| noise([inputs, outputs], DType::F32, 2));
    Linear { weight, ..layer }.no_grad()
}

/// A batch of one sequence.
pub(crate) fn ids(values: &[i64]) -> Tensor<2, Int> {
    let data = TensorData::new(values.to_vec(), [1, values.len()]);
    Tensor::from_data(data, (&device(), DType::I64))
}

/// Rows of one value.
pub(crate) fn rows<T: Element>(value: T, num_rows: usize, dim: usize) -> TokenRows {
    TokenRows::new(vec![value; num_rows * dim], num_rows, dim).unwrap()
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

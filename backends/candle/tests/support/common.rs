//! What the tests share.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use trainable_tokens_core::TokenRows;

pub(crate) const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// The elements of a tensor of any float type as little-endian bytes.
pub(crate) fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.detach().flatten_all().unwrap();
    match tensor.dtype() {
        DType::F64 => rows(flat.to_vec1::<f64>().unwrap()).to_le_bytes(),
        DType::F32 => rows(flat.to_vec1::<f32>().unwrap()).to_le_bytes(),
        DType::F16 => rows(flat.to_vec1::<half::f16>().unwrap()).to_le_bytes(),
        DType::BF16 => rows(flat.to_vec1::<half::bf16>().unwrap()).to_le_bytes(),
        other => panic!("{other:?} is no float"),
    }
}

fn rows<T: trainable_tokens_core::Element>(values: Vec<T>) -> TokenRows {
    let len = values.len();
    TokenRows::new(values, 1, len).unwrap()
}

/// The elements of a tensor of any float type, in `f64`.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor
        .detach()
        .flatten_all()
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap();
    flat.to_vec1().unwrap()
}

/// Deterministic values of the size of one, exact in no type in particular.
pub(crate) fn noise(shape: &[usize], dtype: DType, seed: usize) -> Tensor {
    let len = shape.iter().product::<usize>();
    let value = |i: usize| {
        let noise = u32::try_from(((i + 1) * 7919 + seed * 104_729) % 100_003).unwrap();
        (f64::from(noise) / 50_001.5 - 1.0) * 0.9
    };
    let values: Vec<f64> = (0..len).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
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

/// How far sums in a type may lie apart.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-5,
        DType::F16 => 1e-2,
        _ => 6e-2,
    }
}

//! The frozen linear layer against candle's own.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};
use common::{DTYPES, assert_close, bytes, noise, tolerance, values};
use trainable_tokens_candle::{Error, FrozenLinear};
use trainable_tokens_core::{BackendError, ErrorKind};

#[test]
fn the_output_is_candles_bit_for_bit() {
    for dtype in DTYPES {
        for (out_features, bias) in [(7, false), (300, true), (1, true)] {
            let weight = noise(&[out_features, 70], dtype, 1);
            let bias = bias.then(|| noise(&[out_features], dtype, 2));
            let layer = FrozenLinear::new(weight.clone(), bias.clone()).unwrap();
            let candle = Linear::new(weight, bias);
            for shape in [&[3, 70][..], &[2, 5, 70], &[2, 1, 3, 70], &[1, 70]] {
                let x = noise(shape, dtype, 3);
                let (got, want) = (layer.forward(&x).unwrap(), candle.forward(&x).unwrap());
                assert_eq!(got.dims(), want.dims());
                assert_eq!(bytes(&got), bytes(&want), "{dtype:?} {shape:?}");
            }
        }
    }
}

#[test]
fn a_large_bf16_weight_is_widened_in_parts_and_gives_the_same_bits() {
    let (weight, x) = (
        noise(&[9001, 64], DType::BF16, 1),
        noise(&[4, 64], DType::BF16, 2),
    );
    let layer = FrozenLinear::new(weight.clone(), None).unwrap();
    let want = x.matmul(&weight.t().unwrap()).unwrap();
    assert_eq!(bytes(&layer.forward(&x).unwrap()), bytes(&want));
}

#[test]
fn the_gradient_is_candles_and_goes_to_the_input_only() {
    for dtype in DTYPES {
        for shape in [&[4, 6][..], &[2, 3, 6], &[6]] {
            let weight = Var::from_tensor(&noise(&[600, 6], dtype, 1)).unwrap();
            let bias = Var::from_tensor(&noise(&[600], dtype, 2)).unwrap();
            let input = Var::from_tensor(&noise(shape, dtype, 3)).unwrap();
            let run = |layer: &dyn Module, x: &Tensor| {
                let out = layer.forward(x).unwrap();
                let upstream = noise(out.dims(), dtype, 4);
                (out * upstream).unwrap().sum_all().unwrap().backward().unwrap()
            };
            let frozen =
                FrozenLinear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone())).unwrap();
            let gradients = run(&frozen, &input);
            assert!(gradients.get(&weight).is_none() && gradients.get(&bias).is_none());
            let mut sizes = gradients
                .get_ids()
                .map(|id| gradients.get_id(*id).unwrap().dims());
            assert!(sizes.all(|dims| dims != [600, 6]));
            // The oracle computes in f64.
            let wide = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap();
            let candle = Linear::new(wide(&weight), Some(wide(&bias)));
            let exact = Var::from_tensor(&wide(&input)).unwrap();
            let two = exact.reshape((exact.elem_count() / 6, 6)).unwrap();
            let out = candle.forward(&two).unwrap();
            let upstream = wide(&noise(&[out.elem_count()], dtype, 4));
            let loss = (out.flatten_all().unwrap() * upstream)
                .unwrap()
                .sum_all()
                .unwrap();
            let want = loss.backward().unwrap();
            assert_close(
                &format!("{dtype:?} {shape:?}"),
                &values(gradients.get(&input).unwrap()),
                &values(want.get(&exact).unwrap()),
                tolerance(dtype),
            );
        }
    }
}

#[test]
fn strided_and_empty_inputs_work() {
    let layer = FrozenLinear::new(noise(&[5, 6], DType::F32, 1), None).unwrap();
    let x = Var::from_tensor(&noise(&[6, 4], DType::F32, 2)).unwrap();
    let strided = x.t().unwrap();
    let want = layer.forward(&strided.contiguous().unwrap()).unwrap();
    let got = layer.forward(&strided).unwrap();
    assert_eq!(bytes(&got), bytes(&want));
    let gradients = got.sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&x).unwrap().dims(), [6, 4]);
    // A gradient that arrives transposed.
    let gradients = got.t().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&x).is_some());
    for dtype in DTYPES {
        let layer = FrozenLinear::new(noise(&[5, 6], dtype, 1), Some(noise(&[5], dtype, 1))).unwrap();
        let empty = Tensor::zeros((2, 0, 6), dtype, &Device::Cpu).unwrap();
        assert_eq!(layer.forward(&empty).unwrap().dims(), [2, 0, 5]);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let weight = noise(&[5, 6], DType::F32, 1);
    let kind =
        |weight: &Tensor, bias: Option<Tensor>| FrozenLinear::new(weight.clone(), bias).unwrap_err().kind();
    assert_eq!(kind(&noise(&[6], DType::F32, 1), None), ErrorKind::Shape);
    assert_eq!(
        kind(&weight.to_dtype(DType::U32).unwrap(), None),
        ErrorKind::DType
    );
    assert_eq!(kind(&weight.t().unwrap(), None), ErrorKind::Unsupported);
    assert_eq!(kind(&weight, Some(noise(&[6], DType::F32, 1))), ErrorKind::Shape);
    assert_eq!(kind(&weight, Some(noise(&[5], DType::F16, 1))), ErrorKind::DType);
    let layer = FrozenLinear::new(weight, None).unwrap();
    for (x, text) in [
        (noise(&[2, 5], DType::F32, 1), "expected [2, 6]"),
        (noise(&[2, 6], DType::F16, 1), "expected F32"),
        (noise(&[], DType::F32, 1), "expected [.., in_features]"),
    ] {
        let error = layer.forward(&x).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let error: Error = layer.forward(&noise(&[2, 5], DType::F32, 1)).unwrap_err().into();
    assert_eq!(error.kind(), ErrorKind::Framework);
}

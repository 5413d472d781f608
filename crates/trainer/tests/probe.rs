//! The gradient check on real graphs: whole ones pass, graphs that candle cuts in silence do not.
#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{D, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::TokenRows;
use trainable_tokens_trainer::{Error, GradientCheck, check_gradient};

type Norm = fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>;

/// The square of a residual block's output, with the norm given.
fn loss(layer: &TrainableTokens, norm: Norm) -> Tensor {
    let ids = Tensor::new(&[3u32, 0, 7, 3], &Device::Cpu).unwrap();
    let weight = Tensor::new(&[1.5f32, 0.5, -1.0, 2.0], &Device::Cpu).unwrap();
    let hidden = layer.forward(&ids).unwrap();
    let normed = norm(&hidden, &weight).unwrap();
    ((hidden * 0.3).unwrap() + normed)
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
}

fn check(norm: Norm) -> Result<GradientCheck, Error> {
    let table: Vec<f32> = (0u8..40).map(|at| (f32::from(at) * 0.7).sin()).collect();
    let table = Tensor::from_vec(table, (10, 4), &Device::Cpu).unwrap();
    let mut layer = TrainableTokens::from_tensor(table, &[7, 3]).unwrap();
    let rows = layer.rows().unwrap();
    let gradient = layer.gradient(&loss(&layer, norm).backward().unwrap()).unwrap();
    check_gradient(
        &[rows],
        &[gradient],
        1e-3,
        1,
        f64::from(f32::EPSILON),
        |nudged: &[TokenRows]| {
            layer.set_rows(&nudged[0])?;
            Ok(f64::from(loss(&layer, norm).to_scalar::<f32>()?))
        },
    )
}

#[test]
fn a_whole_graph_passes() {
    let check = check(|x, weight| {
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
        x.broadcast_div(&scale)?.broadcast_mul(weight)
    })
    .unwrap();
    assert!(check.relative_error < 0.02, "{check:?}");
}

#[test]
fn candles_fused_norm_cuts_the_graph_and_is_refused() {
    let error = check(|x, weight| candle_nn::ops::rms_norm(x, weight, 1e-6)).unwrap_err();
    assert!(
        matches!(error, Error::GradientMismatch { relative_error, .. } if relative_error > 0.1),
        "{error}"
    );
}

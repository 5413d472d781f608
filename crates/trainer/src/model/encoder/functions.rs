//! The encoder's norm and nonlinearities, composed of candle's operations, each differentiable.

use candle_core::{D, Result, Tensor};

use crate::config::Activation;
use crate::ops::{add_frozen, mul_frozen, working_dtype};

/// Layer norm over the last dimension, in `f32` at least, with frozen weight and bias (Ba et al. 2016).
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = working_dtype(x.dtype());
    let wide = x.to_dtype(dtype)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let scaled = mul_frozen(&normed, &weight.to_dtype(dtype)?)?;
    add_frozen(&scaled, &bias.to_dtype(dtype)?)?.to_dtype(x.dtype())
}

/// The nonlinearity of `x`, element by element.
pub(super) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::Silu => x.silu(),
    }
}

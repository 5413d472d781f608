//! The norms of a model.

use candle_core::{DType, Tensor};

use super::weights::Weights;
use crate::config::NormKind;
use crate::ops::{Norm, working_dtype};
use crate::{ModelConfig, Result};

/// Loads the norm of a module, for rows of `width`.
pub(super) fn load(weights: &Weights<'_>, config: &ModelConfig, module: &str, width: usize) -> Result<Norm> {
    let (weight, eps) = (
        weights.tensor(&format!("{module}.weight"), &[width])?,
        config.norm_eps,
    );
    Ok(match config.norm {
        NormKind::Rms => Norm::RootMeanSquare { weight, eps },
        NormKind::RmsPlusOne => Norm::RootMeanSquare {
            weight: plus_one(&weight)?,
            eps,
        },
        NormKind::Layer => Norm::Layer {
            weight,
            bias: weights.tensor(&format!("{module}.bias"), &[width])?,
            eps,
        },
    })
}

/// Gemma adds one in `f32`, which half types would round.
fn plus_one(weight: &Tensor) -> Result<Tensor> {
    let dtype: DType = working_dtype(weight.dtype());
    Ok((weight.to_dtype(dtype)? + 1.0)?)
}

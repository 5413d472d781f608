//! Rotary position embeddings (Su et al. 2021) and the causal mask, for one sequence length.

use std::f32::consts::PI;

use candle_core::{D, DType, Device, Result, Tensor};

use crate::config::{ModelConfig, RopeScaling};
use crate::ops::mul_frozen;

/// The angular frequencies of a model.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    inverse_frequencies: Vec<f32>,
}

/// What attention needs to know of the positions `0..L`.
#[derive(Debug)]
pub(super) struct Positions {
    /// `[L, head_dim]`.
    cos: Tensor,
    /// `[L, head_dim]`.
    sin: Tensor,
    /// `[L, L]`, 0 where a query sees a key and the type's lowest number where not.
    pub(super) mask: Tensor,
}

// Positions and dimensions are far below 2^24, so they are exact in `f32`.
#[allow(clippy::cast_possible_truncation)]
impl Rotary {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let theta = config.rope_theta as f32;
        let dim = config.head_dim;
        let frequency = |pair: usize| 1.0 / theta.powf((2 * pair) as f32 / dim as f32);
        let scaled = (0..dim / 2).map(|pair| stretch(frequency(pair), config.rope_scaling));
        Self {
            inverse_frequencies: scaled.collect(),
        }
    }

    /// Angles and mask for `length` positions.
    pub(super) fn positions(
        &self,
        length: usize,
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Positions> {
        let angles: Vec<f32> = (0..length)
            .flat_map(|position| {
                let half = self
                    .inverse_frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency);
                half.clone().chain(half)
            })
            .collect();
        let shape = (length, 2 * self.inverse_frequencies.len());
        let table = |f: fn(f32) -> f32| {
            Tensor::from_vec(
                angles.iter().map(|angle| f(*angle)).collect::<Vec<_>>(),
                shape,
                device,
            )?
            .to_dtype(dtype)
        };
        let window = config.sliding_window.unwrap_or(usize::MAX);
        let hidden = if dtype == DType::F16 {
            f32::from(half::f16::MIN)
        } else {
            f32::MIN
        };
        let sees = |query: usize, key: usize| key <= query && query - key < window;
        let mask: Vec<f32> = (0..length)
            .flat_map(|query| (0..length).map(move |key| if sees(query, key) { 0.0 } else { hidden }))
            .collect();
        Ok(Positions {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
            mask: Tensor::from_vec(mask, (length, length), device)?.to_dtype(dtype)?,
        })
    }
}

impl Positions {
    /// Rotates queries or keys `[B, heads, L, head_dim]`: dimension `i` pairs with `i + head_dim / 2`.
    pub(super) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let first = x.narrow(D::Minus1, 0, half)?;
        let second = x.narrow(D::Minus1, half, half)?;
        let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
        mul_frozen(x, &self.cos)? + mul_frozen(&turned, &self.sin)?
    }
}

#[allow(clippy::cast_possible_truncation)]
fn stretch(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let [factor, low, high, context] = [
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            ]
            .map(|x| x as f32);
            let wavelength = 2.0 * PI / frequency;
            if wavelength < context / high {
                frequency
            } else if wavelength > context / low {
                frequency / factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

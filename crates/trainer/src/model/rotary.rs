//! The angles of rotary position embeddings (Su et al. 2021).

use std::f32::consts::PI;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::{ModelConfig, RopeScaling};
use crate::ops::Rotation;

/// The angular frequencies of a model.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    inverse_frequencies: Vec<f32>,
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

    /// The rotation at `length` positions.
    pub(super) fn rotation(&self, length: usize, dtype: DType, device: &Device) -> Result<Rotation> {
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
        Ok(Rotation {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
        })
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

//! The angles of rotary position embeddings (Su et al. 2021).

use std::f64::consts::PI;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::{LayerType, ModelConfig, Positions, Rope, RopeScaling};
use crate::ops::Rotation;

/// How the heads of a model turn.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    full: Rope,
    sliding: Rope,
    head_dim: usize,
    max_position_embeddings: usize,
}

/// The rotations of a sequence, for each type of layer; none where positions are learned.
#[derive(Clone, Debug, Default)]
pub(super) struct Rotations {
    full: Option<Rotation>,
    sliding: Option<Rotation>,
}

impl Rotations {
    pub(super) fn of(&self, layer_type: LayerType) -> Option<&Rotation> {
        match layer_type {
            LayerType::Full => self.full.as_ref(),
            LayerType::Sliding => self.sliding.as_ref(),
        }
    }
}

impl Rotary {
    pub(super) fn new(config: &ModelConfig) -> Option<Self> {
        match &config.positions {
            Positions::Learned => None,
            Positions::Rotary { full, sliding } => Some(Self {
                full: full.clone(),
                sliding: sliding.clone(),
                head_dim: config.head_dim,
                max_position_embeddings: config.max_position_embeddings,
            }),
        }
    }

    /// The rotations at `length` positions.
    pub(super) fn rotations(&self, length: usize, dtype: DType, device: &Device) -> Result<Rotations> {
        let full = self.rotation(&self.full, length, dtype, device)?;
        let sliding = if self.sliding == self.full {
            full.clone()
        } else {
            self.rotation(&self.sliding, length, dtype, device)?
        };
        Ok(Rotations {
            full: Some(full),
            sliding: Some(sliding),
        })
    }

    // Positions are far below 2^24, so they are exact in `f32`.
    #[allow(clippy::cast_possible_truncation)]
    fn rotation(&self, rope: &Rope, length: usize, dtype: DType, device: &Device) -> Result<Rotation> {
        let frequencies = self.frequencies(rope, length);
        let angles: Vec<f32> = (0..length)
            .flat_map(|position| {
                let half = frequencies
                    .iter()
                    .map(move |frequency| position as f32 * frequency);
                half.clone().chain(half)
            })
            .collect();
        let factor = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        };
        let table = |f: fn(f32) -> f32| {
            Tensor::from_vec(
                angles.iter().map(|angle| f(*angle) * factor).collect::<Vec<_>>(),
                (length, 2 * frequencies.len()),
                device,
            )?
            .to_dtype(dtype)
        };
        Ok(Rotation {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
        })
    }

    /// The angular frequencies of pairs of dimensions, for a sequence of `length`
    /// (`transformers/modeling_rope_utils.py`).
    #[allow(clippy::cast_possible_truncation)]
    fn frequencies(&self, rope: &Rope, length: usize) -> Vec<f32> {
        let theta = match rope.scaling {
            RopeScaling::Dynamic { factor } => self.stretched_theta(rope.theta, factor, length),
            _ => rope.theta as f32,
        };
        let dim = self.head_dim as f32;
        let wavelength = |pair: usize| theta.powf((2 * pair) as f32 / dim);
        let frequency = |pair: usize| 1.0 / wavelength(pair);
        let pairs = 0..self.head_dim / 2;
        match &rope.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => pairs.map(frequency).collect(),
            RopeScaling::Linear { factor } => pairs.map(|pair| frequency(pair) / *factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings;
                let parameters = [factor, low_freq_factor, high_freq_factor, context].map(|x| *x as f32);
                pairs.map(|pair| llama3(frequency(pair), parameters)).collect()
            }
            RopeScaling::Yarn { factor, .. } => {
                let ramp = self.yarn_ramp(rope);
                let mix = |pair: usize| {
                    let (kept, kept_part) = (frequency(pair), 1.0 - ramp(pair));
                    kept / *factor as f32 * (1.0 - kept_part) + kept * kept_part
                };
                pairs.map(mix).collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                ..
            } => {
                let is_long = length as f64 > *original_max_position_embeddings;
                let divisors = if is_long { long_factor } else { short_factor };
                let divided = |(pair, divisor): (usize, &f64)| 1.0 / (*divisor as f32 * wavelength(pair));
                pairs.zip(divisors).map(divided).collect()
            }
        }
    }

    /// The base for a sequence that may be longer than the model's positions.
    #[allow(clippy::cast_possible_truncation)]
    fn stretched_theta(&self, theta: f64, factor: f64, length: usize) -> f32 {
        let (dim, positions) = (self.head_dim as f64, self.max_position_embeddings as f64);
        let length = (length as f64).max(positions);
        let growth = factor * length / positions - (factor - 1.0);
        (theta * growth.powf(dim / (dim - 2.0))) as f32
    }

    /// How much of the stretching each pair of dimensions gets, from 0 to 1.
    #[allow(clippy::cast_possible_truncation)]
    fn yarn_ramp(&self, rope: &Rope) -> impl Fn(usize) -> f32 + use<> {
        let (mut low, mut high) = (0.0, 0.0);
        if let RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            original_max_position_embeddings: context,
            truncate,
            ..
        } = rope.scaling
        {
            let dim = self.head_dim as f64;
            let pair_that_turns =
                |times: f64| dim * (context / (times * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
            (low, high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
        }
        move |pair| ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0)
    }
}

fn llama3(frequency: f32, [factor, low, high, context]: [f32; 4]) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < context / high {
        frequency
    } else if wavelength > context / low {
        frequency / factor
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

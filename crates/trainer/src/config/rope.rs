//! Rotary settings, in both spellings.

use serde::Deserialize;

use super::family::Family;
use super::model::{Positions, Rope, RopeScaling};
use super::parse::{Raw, Refusal, unsupported};

/// `rope_scaling` or `rope_parameters`; the latter may hold one such object for each type of layer.
#[derive(Clone, Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Box<[f64]>>,
    long_factor: Option<Box<[f64]>>,
    full_attention: Option<Box<RawRope>>,
    sliding_attention: Option<Box<RawRope>>,
}

/// The rotations of layers with and without a sliding window.
pub(super) fn positions(raw: &Raw, family: &Family, max_positions: usize) -> Result<Positions, Refusal> {
    let given = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let nested = given.filter(|rope| rope.full_attention.is_some() || rope.sliding_attention.is_some());
    let (full, sliding) = match nested {
        Some(rope) => (rope.full_attention.as_deref(), rope.sliding_attention.as_deref()),
        // Where local layers have a base of their own, what is not said of them is about the others.
        None if family.local_rope_theta.is_some() => (given, None),
        None => (given, given),
    };
    let theta = raw.rope_theta.unwrap_or(family.rope_theta);
    let local = match family.local_rope_theta {
        Some(default) => raw.rope_local_base_freq.unwrap_or(default),
        None => theta,
    };
    // Where it is told outside, it counts, but for settings by layer.
    let original = raw.original_max_position_embeddings.filter(|_| nested.is_none());
    let rope = |raw: Option<&RawRope>, theta| {
        let scaling = |raw: &RawRope| {
            let original = original.or(raw.original_max_position_embeddings);
            scaling(raw, max_positions as f64, original)
        };
        Ok(Rope {
            theta: raw.and_then(|raw| raw.rope_theta).unwrap_or(theta),
            scaling: raw.map_or(Ok(RopeScaling::Default), scaling)?,
        })
    };
    Ok(Positions::Rotary {
        full: rope(full, theta)?,
        sliding: rope(sliding, local)?,
    })
}

fn scaling(rope: &RawRope, max_positions: f64, original: Option<f64>) -> Result<RopeScaling, Refusal> {
    let missing = |name: &str| Refusal::Invalid(format!("{name} of the rotary settings is missing"));
    let need = |name: &str, value: Option<f64>| value.ok_or_else(|| missing(name));
    let original = original.unwrap_or(max_positions);
    let name = rope.rope_type.as_ref().or(rope.old_type.as_ref());
    match name.map_or("default", String::as_str) {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: need("factor", rope.factor)?,
        }),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: need("factor", rope.factor)?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_max_position_embeddings: original,
        }),
        "yarn" => {
            let factor = rope.factor.unwrap_or(max_positions / original);
            Ok(RopeScaling::Yarn {
                factor,
                attention_factor: rope
                    .attention_factor
                    .unwrap_or_else(|| yarn_attention(rope, factor)),
                beta_fast: rope.beta_fast.unwrap_or(32.0),
                beta_slow: rope.beta_slow.unwrap_or(1.0),
                original_max_position_embeddings: original,
                truncate: rope.truncate.unwrap_or(true),
            })
        }
        "longrope" => {
            let divisors = |name, value: &Option<Box<[f64]>>| value.clone().ok_or_else(|| missing(name));
            let factor = rope.factor.unwrap_or(max_positions / original);
            Ok(RopeScaling::LongRope {
                short_factor: divisors("short_factor", &rope.short_factor)?,
                long_factor: divisors("long_factor", &rope.long_factor)?,
                attention_factor: rope
                    .attention_factor
                    .unwrap_or_else(|| longrope_attention(factor, original)),
                original_max_position_embeddings: original,
            })
        }
        other => {
            let hint = "the decoder implements default, linear, dynamic, llama3, yarn and longrope";
            Err(unsupported("rope_type", other, hint))
        }
    }
}

/// The attention factor of a config that does not say it (`transformers/modeling_rope_utils.py`,
/// `_compute_yarn_parameters`).
fn yarn_attention(rope: &RawRope, factor: f64) -> f64 {
    let scale = |mscale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    };
    match (rope.mscale, rope.mscale_all_dim) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
        _ => scale(1.0),
    }
}

/// The same, for `_compute_longrope_parameters`.
fn longrope_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / original.ln()).sqrt()
    }
}

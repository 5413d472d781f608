//! Checks that a model can be computed with.

use super::model::{LayerType, ModelConfig, NormKind, Positions, Rope, RopeScaling};

impl ModelConfig {
    /// Says what is wrong, if anything is.
    pub(super) fn check(&self) -> Result<(), String> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if self.num_attention_heads.checked_mul(self.head_dim).is_none() {
            return Err(format!(
                "num_attention_heads {} of head_dim {} are wider than any tensor",
                self.num_attention_heads, self.head_dim
            ));
        }
        if self.sliding_window == Some(0) {
            return Err("sliding_window is 0, so no position would see any other".to_owned());
        }
        if self.sliding_window.is_none() && self.layer_types.contains(&LayerType::Sliding) {
            return Err("layers have a sliding window, but sliding_window is missing".to_owned());
        }
        if let Some(id) = self.pad_token_id.filter(|id| *id as usize >= self.vocab_size) {
            return Err(format!(
                "pad_token_id {id} is outside vocab_size {}",
                self.vocab_size
            ));
        }
        if !(self.norm_eps >= 0.0 && self.norm_eps.is_finite()) {
            let name = match self.norm {
                NormKind::Layer => "layer_norm_epsilon",
                NormKind::Rms | NormKind::RmsPlusOne => "rms_norm_eps",
            };
            return Err(format!("{name} is {}, expected 0 or more", self.norm_eps));
        }
        positive("query_pre_attn_scalar", self.query_pre_attn_scalar)?;
        for (name, cap) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            cap.map_or(Ok(()), |cap| positive(name, cap))?;
        }
        match &self.positions {
            Positions::Learned if self.head_dim * self.num_attention_heads != self.hidden_size => {
                Err(format!(
                    "hidden_size {} is not a multiple of num_attention_heads {}",
                    self.hidden_size, self.num_attention_heads
                ))
            }
            Positions::Learned => Ok(()),
            Positions::Rotary { full, sliding } => {
                if !self.head_dim.is_multiple_of(2) {
                    return Err(format!(
                        "head_dim {} is odd, so it cannot be rotated",
                        self.head_dim
                    ));
                }
                check_rope(full, self.head_dim)?;
                check_rope(sliding, self.head_dim)
            }
        }
    }
}

fn check_rope(rope: &Rope, head_dim: usize) -> Result<(), String> {
    positive("rope_theta", rope.theta)?;
    match &rope.scaling {
        RopeScaling::Default => Ok(()),
        // The exponent of the base's growth is `head_dim / (head_dim - 2)`.
        RopeScaling::Dynamic { .. } if head_dim == 2 => {
            Err("head_dim is 2, which is too small for dynamic rotary embeddings".to_owned())
        }
        RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => positive("factor", *factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            positive("factor", *factor)?;
            positive("low_freq_factor", *low_freq_factor)?;
            positive("high_freq_factor", *high_freq_factor)?;
            positive(
                "original_max_position_embeddings",
                *original_max_position_embeddings,
            )?;
            if low_freq_factor < high_freq_factor {
                return Ok(());
            }
            Err(format!(
                "low_freq_factor {low_freq_factor} is not below high_freq_factor {high_freq_factor}"
            ))
        }
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            ..
        } => {
            positive("factor", *factor)?;
            positive("attention_factor", *attention_factor)?;
            positive("beta_fast", *beta_fast)?;
            positive("beta_slow", *beta_slow)?;
            positive(
                "original_max_position_embeddings",
                *original_max_position_embeddings,
            )
        }
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            attention_factor,
            original_max_position_embeddings,
        } => {
            for (name, factors) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                if factors.len() != head_dim / 2 {
                    return Err(format!(
                        "{name} has {} numbers, not one for each pair of the {head_dim} dimensions of a head",
                        factors.len()
                    ));
                }
                factors.iter().try_for_each(|factor| positive(name, *factor))?;
            }
            positive("attention_factor", *attention_factor)?;
            positive(
                "original_max_position_embeddings",
                *original_max_position_embeddings,
            )
        }
    }
}

/// Rotary settings are divided by in single precision: they must be positive and finite there.
#[allow(clippy::cast_possible_truncation)]
fn positive(name: &str, value: f64) -> Result<(), String> {
    let single = value as f32;
    if single > 0.0 && single.is_finite() {
        return Ok(());
    }
    Err(format!(
        "{name} is {value}, expected a positive number in single precision"
    ))
}

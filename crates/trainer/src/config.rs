//! `config.json` of the decoders that this crate implements.

use std::path::Path;

use serde::Deserialize;

use crate::json::parse_object;
use crate::{Error, Result};

/// How the angular frequencies of rotary embeddings are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, with a ramp between (Llama 3).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
    },
}

/// What the decoder needs of a model of the Llama family (`llama`, `mistral`), with transformers' defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Positions that a query sees, itself included; all earlier ones if absent (Mistral).
    pub sliding_window: Option<usize>,
    /// Whether the projections of attention have biases.
    pub attention_bias: bool,
    /// Whether the projections of the feed-forward layer have biases.
    pub mlp_bias: bool,
    /// Whether the head shares the embedding table.
    pub tie_word_embeddings: bool,
    /// The embedding's `padding_idx`.
    pub pad_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// `config.json` as it is written, in both spellings of rotary settings.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    max_position_embeddings: Option<usize>,
    sliding_window: Option<usize>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
    pad_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

const FAMILIES: &str = "the decoder implements model_type llama and mistral";

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Config`] for a missing or impossible field, [`Error::UnsupportedModel`] for another
    /// family or a setting that would change the result and is not implemented.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let config = |reason: String| Error::Config {
            path: path.to_owned(),
            reason,
        };
        let raw: Raw =
            parse_object(&text).map_err(|reason| config(format!("not a model config: {reason}")))?;
        Self::from_raw(raw, path)
    }

    fn from_raw(raw: Raw, path: &Path) -> Result<Self> {
        let unsupported = |what: String, hint| Error::UnsupportedModel {
            path: path.to_owned(),
            what,
            hint,
        };
        let model_type = raw.model_type.clone().unwrap_or_default();
        if !matches!(model_type.as_str(), "llama" | "mistral") {
            return Err(unsupported(format!("model_type '{model_type}'"), FAMILIES));
        }
        if let Some(act) = raw
            .hidden_act
            .as_deref()
            .filter(|act| !matches!(*act, "silu" | "swish"))
        {
            return Err(unsupported(
                format!("hidden_act '{act}'"),
                "the decoder implements silu",
            ));
        }
        let need = |name: &str, value: Option<usize>| match value {
            Some(0) => Err(Error::Config {
                path: path.to_owned(),
                reason: format!("{name} is 0"),
            }),
            Some(value) => Ok(value),
            None => Err(Error::Config {
                path: path.to_owned(),
                reason: format!("{name} is missing"),
            }),
        };
        let hidden_size = need("hidden_size", raw.hidden_size)?;
        let num_attention_heads = need("num_attention_heads", raw.num_attention_heads)?;
        let config = Self {
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: need("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: need("num_hidden_layers", raw.num_hidden_layers)?,
            num_attention_heads,
            num_key_value_heads: need(
                "num_key_value_heads",
                raw.num_key_value_heads.or(Some(num_attention_heads)),
            )?,
            head_dim: need(
                "head_dim",
                raw.head_dim.or(Some(hidden_size / num_attention_heads)),
            )?,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: rope_theta(&raw),
            rope_scaling: rope_scaling(&raw, path)?,
            max_position_embeddings: need(
                "max_position_embeddings",
                raw.max_position_embeddings.or(Some(2048)),
            )?,
            sliding_window: raw.sliding_window.filter(|_| model_type == "mistral"),
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            pad_token_id: raw.pad_token_id.and_then(|id| u32::try_from(id).ok()),
            eos_token_ids: match raw.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => u32::try_from(id).into_iter().collect(),
                Some(OneOrMany::Many(ids)) => {
                    ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()
                }
            },
            model_type,
        };
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let config = |reason: String| {
            Err(Error::Config {
                path: path.to_owned(),
                reason,
            })
        };
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return config(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return config(format!(
                "head_dim {} is odd, so it cannot be rotated",
                self.head_dim
            ));
        }
        if self.pad_token_id.is_some_and(|id| id as usize >= self.vocab_size) {
            return config(format!(
                "pad_token_id {:?} is outside vocab_size {}",
                self.pad_token_id, self.vocab_size
            ));
        }
        Ok(())
    }
}

fn rope_theta(raw: &Raw) -> f64 {
    let nested = raw.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
    nested.or(raw.rope_theta).unwrap_or(10_000.0)
}

fn rope_scaling(raw: &Raw, path: &Path) -> Result<RopeScaling> {
    let Some(rope) = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()) else {
        return Ok(RopeScaling::Default);
    };
    let need = |name: &str, value: Option<f64>| {
        let reason = format!("{name} of the rotary settings is missing");
        value.ok_or_else(|| Error::Config {
            path: path.to_owned(),
            reason,
        })
    };
    match rope.rope_type.as_deref().unwrap_or("default") {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: need("factor", rope.factor)?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_max_position_embeddings: need(
                "original_max_position_embeddings",
                rope.original_max_position_embeddings,
            )?,
        }),
        other => Err(Error::UnsupportedModel {
            path: path.to_owned(),
            what: format!("rope_type '{other}'"),
            hint: "the decoder implements default, linear and llama3",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ModelConfig> {
        ModelConfig::from_raw(serde_json::from_str(json).unwrap(), Path::new("config.json"))
    }

    const MINIMAL: &str = r#""vocab_size":10,"hidden_size":8,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":2"#;

    #[test]
    fn both_spellings_of_rotary_settings() {
        let old = parse(&format!(
            r#"{{"model_type":"llama",{MINIMAL},"rope_theta":5e5,"rope_scaling":{{"type":"linear","factor":2.0}}}}"#
        ));
        let new = parse(&format!(
            r#"{{"model_type":"llama",{MINIMAL},"rope_parameters":{{"rope_type":"linear","factor":2.0,"rope_theta":5e5}}}}"#
        ));
        let (old, new) = (old.unwrap(), new.unwrap());
        assert_eq!(old, new);
        assert_eq!(new.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(
            (new.head_dim, new.num_key_value_heads, new.tie_word_embeddings),
            (4, 2, false)
        );
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (json, name) in [
            (r#"{"model_type":"gpt2"}"#.to_owned(), "model_type 'gpt2'"),
            ("{}".to_owned(), "model_type ''"),
            (
                format!(r#"{{"model_type":"llama",{MINIMAL},"hidden_act":"gelu"}}"#),
                "hidden_act 'gelu'",
            ),
            (
                format!(r#"{{"model_type":"llama",{MINIMAL},"rope_scaling":{{"rope_type":"yarn"}}}}"#),
                "rope_type 'yarn'",
            ),
            (
                r#"{"model_type":"llama","vocab_size":3}"#.to_owned(),
                "hidden_size is missing",
            ),
            (
                format!(r#"{{"model_type":"llama",{MINIMAL},"num_key_value_heads":3}}"#),
                "not a multiple",
            ),
        ] {
            let message = parse(&json).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }
}

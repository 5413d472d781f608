//! Checks the fields of a `config.json`.

use serde::Deserialize;

use super::model::{ModelConfig, RopeScaling};
use crate::json::parse_object;

/// Why a config is refused.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It is not JSON, or a field is missing or impossible.
    Invalid(String),
    /// It asks for what the decoder does not implement.
    Unsupported {
        /// The field and its value.
        what: String,
        /// What is supported.
        hint: &'static str,
    },
}

/// Parses the bytes of a `config.json`.
pub(crate) fn config(json: &[u8]) -> Result<ModelConfig, Refusal> {
    let raw = parse_object(json);
    ModelConfig::from_raw(raw.map_err(|reason| Refusal::Invalid(format!("not a model config: {reason}")))?)
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
    fn from_raw(raw: Raw) -> Result<Self, Refusal> {
        let unsupported = |what: String, hint| Refusal::Unsupported { what, hint };
        let model_type = raw.model_type.clone().unwrap_or_default();
        if !matches!(model_type.as_str(), "llama" | "mistral") {
            return Err(unsupported(
                format!("model_type '{}'", model_type.escape_debug()),
                FAMILIES,
            ));
        }
        if let Some(act) = raw
            .hidden_act
            .as_deref()
            .filter(|act| !matches!(*act, "silu" | "swish"))
        {
            return Err(unsupported(
                format!("hidden_act '{}'", act.escape_debug()),
                "the decoder implements silu",
            ));
        }
        let need = |name: &str, value: Option<usize>| match value {
            Some(0) => Err(Refusal::Invalid(format!("{name} is 0"))),
            Some(value) => Ok(value),
            None => Err(Refusal::Invalid(format!("{name} is missing"))),
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
            rope_scaling: rope_scaling(&raw)?,
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
        config.check().map_err(Refusal::Invalid)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!(
                "head_dim {} is odd, so it cannot be rotated",
                self.head_dim
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
        if let Some(id) = self.pad_token_id.filter(|id| *id as usize >= self.vocab_size) {
            return Err(format!(
                "pad_token_id {id} is outside vocab_size {}",
                self.vocab_size
            ));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps.is_finite()) {
            return Err(format!(
                "rms_norm_eps is {}, expected 0 or more",
                self.rms_norm_eps
            ));
        }
        positive("rope_theta", self.rope_theta)?;
        match self.rope_scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                positive(
                    "original_max_position_embeddings",
                    original_max_position_embeddings,
                )?;
                if low_freq_factor < high_freq_factor {
                    return Ok(());
                }
                Err(format!(
                    "low_freq_factor {low_freq_factor} is not below high_freq_factor {high_freq_factor}"
                ))
            }
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

fn rope_theta(raw: &Raw) -> f64 {
    let nested = raw.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
    nested.or(raw.rope_theta).unwrap_or(10_000.0)
}

fn rope_scaling(raw: &Raw) -> Result<RopeScaling, Refusal> {
    let Some(rope) = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()) else {
        return Ok(RopeScaling::Default);
    };
    let need = |name: &str, value: Option<f64>| {
        let reason = format!("{name} of the rotary settings is missing");
        value.ok_or(Refusal::Invalid(reason))
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
        other => Err(Refusal::Unsupported {
            what: format!("rope_type '{}'", other.escape_debug()),
            hint: "the decoder implements default, linear and llama3",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ModelConfig, Refusal> {
        config(json.as_bytes())
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
            (r#"{"model_type":"gpt\n2"}"#.to_owned(), r"model_type 'gpt\n2'"),
        ] {
            let (Refusal::Invalid(message) | Refusal::Unsupported { what: message, .. }) =
                parse(&json).unwrap_err();
            assert!(message.contains(name), "{message}");
        }
    }
    #[test]
    fn what_cannot_be_computed_with_is_refused() {
        const LLAMA3: &str =
            r#""rope_scaling":{"rope_type":"llama3","factor":8.0,"original_max_position_embeddings":64"#;
        for (fields, reason) in [
            (
                r#""head_dim":9223372036854775808"#.to_owned(),
                "wider than any tensor",
            ),
            (r#""rope_theta":0.0"#.to_owned(), "rope_theta is 0"),
            (r#""rope_theta":-1e4"#.to_owned(), "rope_theta is -10000"),
            (r#""rope_theta":1e39"#.to_owned(), "rope_theta is 1000"),
            (r#""rope_theta":5e-324"#.to_owned(), "rope_theta is 0.000"),
            (r#""rms_norm_eps":-1e-6"#.to_owned(), "rms_norm_eps is -0.000001"),
            (
                r#""rope_scaling":{"type":"linear","factor":0}"#.to_owned(),
                "factor is 0",
            ),
            (
                format!(r#"{LLAMA3},"low_freq_factor":4,"high_freq_factor":4}}"#),
                "low_freq_factor 4 is not below",
            ),
            (
                format!(r#"{LLAMA3},"low_freq_factor":0,"high_freq_factor":4}}"#),
                "low_freq_factor is 0",
            ),
            (r#""pad_token_id":10"#.to_owned(), "pad_token_id 10 is outside"),
        ] {
            let json = format!(r#"{{"model_type":"llama",{MINIMAL},{fields}}}"#);
            match parse(&json) {
                Err(Refusal::Invalid(message)) => assert!(message.contains(reason), "{message}"),
                other => panic!("{json}: {other:?}"),
            }
        }
        let json = format!(r#"{{"model_type":"mistral",{MINIMAL},"sliding_window":0}}"#);
        assert!(matches!(parse(&json), Err(Refusal::Invalid(reason)) if reason.contains("sliding_window")));
    }
}

//! Reads the fields of a `config.json`.

use serde::{Deserialize, Deserializer};

use super::family::Family;
use super::layers::{activation, layer_types, window};
use super::model::{ModelConfig, Positions};
use super::rope::{self, RawRope};
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
    ModelConfig::from_raw(&raw.map_err(|reason| Refusal::Invalid(format!("not a model config: {reason}")))?)
}

/// The tokens that end a text, by the bytes of a `generation_config.json`.
pub(crate) fn ends(json: &[u8]) -> Result<Option<Vec<u32>>, Refusal> {
    #[derive(Deserialize)]
    struct Generation {
        eos_token_id: Option<OneOrMany>,
    }
    let generation: Generation = parse_object(json)
        .map_err(|reason| Refusal::Invalid(format!("not a generation config: {reason}")))?;
    Ok(generation.eos_token_id.map(OneOrMany::ids))
}

/// `config.json` as it is written, in both spellings of rotary settings, and in GPT-2's of sizes.
#[derive(Deserialize)]
pub(super) struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    #[serde(alias = "n_embd")]
    hidden_size: Option<usize>,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<usize>,
    #[serde(alias = "n_layer")]
    num_hidden_layers: Option<usize>,
    #[serde(alias = "n_head")]
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(alias = "layer_norm_epsilon")]
    rms_norm_eps: Option<f64>,
    #[serde(alias = "activation_function")]
    pub(super) hidden_act: Option<String>,
    pub(super) hidden_activation: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_local_base_freq: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    pub(super) rope_parameters: Option<RawRope>,
    #[serde(alias = "n_positions")]
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    pub(super) sliding_window: Field<usize>,
    pub(super) original_max_position_embeddings: Option<f64>,
    pub(super) layer_types: Option<Vec<String>>,
    pub(super) sliding_window_pattern: Option<usize>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) max_window_layers: Option<usize>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(default)]
    attn_logit_softcapping: Field<f64>,
    #[serde(default)]
    final_logit_softcapping: Field<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    scale_attn_weights: Option<bool>,
    scale_attn_by_inverse_layer_idx: Option<bool>,
    add_cross_attention: Option<bool>,
    use_bidirectional_attention: Option<bool>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    pad_token_id: Field<i64>,
    #[serde(default)]
    eos_token_id: Field<OneOrMany>,
}

/// A field that may be `null`, which is not the same as left out.
#[derive(Clone, Copy, Default)]
pub(super) enum Field<T> {
    #[default]
    Absent,
    Null,
    Given(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(deserializer)?.map_or(Self::Null, Self::Given))
    }
}

impl<T: Clone> Field<T> {
    pub(super) fn or(&self, default: Option<T>) -> Option<T> {
        match self {
            Self::Absent => default,
            Self::Null => None,
            Self::Given(value) => Some(value.clone()),
        }
    }
}

/// A token, or several.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    /// The tokens that can be any.
    pub(super) fn ids(self) -> Vec<u32> {
        let ids = match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        };
        ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()
    }
}

/// What a model type that is none of them is told.
pub(super) const FAMILY_HINT: &str = "the decoder implements model_type llama, mistral, qwen2, qwen3, gemma, gemma2, \
                                      gemma3_text and gpt2, the encoder bert, roberta and xlm-roberta";

/// More layers than any model has: each is listed before a weight shows that it is there.
const MOST_LAYERS: usize = 1 << 16;

impl ModelConfig {
    fn from_raw(raw: &Raw) -> Result<Self, Refusal> {
        let model_type = raw.model_type.clone().unwrap_or_default();
        let Some(family) = Family::named(&model_type) else {
            return Err(unsupported("model_type", &model_type, FAMILY_HINT));
        };
        refuse_settings(raw)?;
        let hidden_size = need("hidden_size", raw.hidden_size)?;
        let num_attention_heads = need("num_attention_heads", raw.num_attention_heads)?;
        let num_hidden_layers = need("num_hidden_layers", raw.num_hidden_layers)?;
        if num_hidden_layers > MOST_LAYERS {
            let reason = format!("num_hidden_layers is {num_hidden_layers}, more than {MOST_LAYERS}");
            return Err(Refusal::Invalid(reason));
        }
        let max_position_embeddings = need(
            "max_position_embeddings",
            raw.max_position_embeddings
                .or(Some(family.max_position_embeddings)),
        )?;
        let head_dim = raw.head_dim.or(family.head_dim);
        let head_dim = need("head_dim", head_dim.or(Some(hidden_size / num_attention_heads)))?;
        let is_gpt2 = family.names.positions.is_some();
        let inner = raw
            .intermediate_size
            .or(is_gpt2.then(|| hidden_size.saturating_mul(4)));
        let asked = raw.attention_bias == Some(true);
        let scalar = family
            .query_pre_attn_scalar
            .map(|scalar| raw.query_pre_attn_scalar.unwrap_or(scalar));
        let scalar = if raw.scale_attn_weights == Some(false) {
            Some(1.0)
        } else {
            scalar
        };
        let pad_token_id = raw
            .pad_token_id
            .or(family.pad_token_id)
            .filter(|_| family.has_padding);
        let eos_token_id = raw.eos_token_id.or(family.eos_token_id.map(OneOrMany::One));
        let config = Self {
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: need("intermediate_size", inner)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: need(
                "num_key_value_heads",
                raw.num_key_value_heads.or(Some(num_attention_heads)),
            )?,
            head_dim,
            activation: activation(raw, family)?,
            norm: family.norm,
            norm_eps: raw.rms_norm_eps.unwrap_or(family.norm_eps),
            embed_scale: family.scales_embeddings.then(|| (hidden_size as f64).sqrt()),
            positions: if is_gpt2 {
                Positions::Learned
            } else {
                rope::positions(raw, family, max_position_embeddings)?
            },
            max_position_embeddings,
            layer_types: layer_types(raw, family, num_hidden_layers)?,
            sliding_window: window(raw, family),
            query_pre_attn_scalar: scalar.unwrap_or(head_dim as f64),
            attn_logit_softcapping: family
                .attn_logit_softcapping
                .and_then(|default| raw.attn_logit_softcapping.or(Some(default))),
            final_logit_softcapping: raw.final_logit_softcapping.or(family.final_logit_softcapping),
            qkv_bias: family.qkv_bias.resolve(asked),
            output_bias: family.output_bias.resolve(asked),
            mlp_bias: family.mlp_bias.resolve(raw.mlp_bias == Some(true)),
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(family.tie_word_embeddings),
            pad_token_id: pad_token_id.and_then(|id| u32::try_from(id).ok()),
            eos_token_ids: eos_token_id.map_or_else(Vec::new, OneOrMany::ids),
            names: family.names,
            model_type,
        };
        config.check().map_err(Refusal::Invalid)?;
        Ok(config)
    }
}

pub(super) fn need(name: &str, value: Option<usize>) -> Result<usize, Refusal> {
    match value {
        Some(0) => Err(Refusal::Invalid(format!("{name} is 0"))),
        Some(value) => Ok(value),
        None => Err(Refusal::Invalid(format!("{name} is missing"))),
    }
}

pub(super) fn unsupported(field: &str, value: &str, hint: &'static str) -> Refusal {
    let what = format!("{field} '{}'", value.escape_debug());
    Refusal::Unsupported { what, hint }
}

/// Refuses what would change the result.
fn refuse_settings(raw: &Raw) -> Result<(), Refusal> {
    let is_set = |value: Option<bool>| value == Some(true);
    for (name, value) in [
        (
            "scale_attn_by_inverse_layer_idx",
            raw.scale_attn_by_inverse_layer_idx,
        ),
        ("add_cross_attention", raw.add_cross_attention),
        ("use_bidirectional_attention", raw.use_bidirectional_attention),
    ] {
        if is_set(value) {
            return Err(unsupported(name, "true", "the decoder implements false"));
        }
    }
    match raw.partial_rotary_factor {
        Some(factor) if factor != 1.0 => {
            let hint = "the decoder rotates whole heads";
            Err(unsupported("partial_rotary_factor", &factor.to_string(), hint))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::{Rope, RopeScaling};
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
        let rope = Rope {
            theta: 5e5,
            scaling: RopeScaling::Linear { factor: 2.0 },
        };
        let positions = Positions::Rotary {
            full: rope.clone(),
            sliding: rope,
        };
        assert_eq!(new.positions, positions);
        assert_eq!(
            (new.head_dim, new.num_key_value_heads, new.tie_word_embeddings),
            (4, 2, false)
        );
    }

    /// As transformers reads it: settings by layer leave it to each of them.
    #[test]
    fn a_context_length_outside_of_the_settings_counts() {
        let original = |fields: &str| {
            let config = parse(&format!(
                r#"{{"model_type":"gemma3_text",{MINIMAL},"head_dim":4,{fields}}}"#
            ));
            match config.unwrap().positions {
                Positions::Rotary { full, .. } => full.scaling,
                Positions::Learned => panic!("no rotation"),
            }
        };
        let longrope = |inside: &str| {
            format!(
                r#"{{"rope_type":"longrope","short_factor":[1,2],"long_factor":[3,4],"factor":4{inside}}}"#
            )
        };
        let outside = r#""original_max_position_embeddings":16,"rope_parameters""#;
        for (fields, want) in [
            (format!("{outside}:{}", longrope("")), 16.0),
            (
                format!(
                    "{outside}:{}",
                    longrope(r#","original_max_position_embeddings":8"#)
                ),
                16.0,
            ),
            (
                format!(
                    r#""rope_parameters":{}"#,
                    longrope(r#","original_max_position_embeddings":8"#)
                ),
                8.0,
            ),
            (
                format!(r#"{outside}:{{"full_attention":{}}}"#, longrope("")),
                131_072.0,
            ),
        ] {
            let attention_factor = (1.0 + 4f64.ln() / f64::ln(want)).sqrt();
            let scaling = RopeScaling::LongRope {
                short_factor: [1.0, 2.0].into(),
                long_factor: [3.0, 4.0].into(),
                attention_factor,
                original_max_position_embeddings: want,
            };
            assert_eq!(original(&fields), scaling, "{fields}");
        }
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (json, name) in [
            (r#"{"model_type":"gpt3"}"#.to_owned(), "model_type 'gpt3'"),
            ("{}".to_owned(), "model_type ''"),
            (
                format!(r#"{{"model_type":"llama",{MINIMAL},"hidden_act":"quick_gelu"}}"#),
                "hidden_act 'quick_gelu'",
            ),
            (
                format!(
                    r#"{{"model_type":"llama",{MINIMAL},"rope_scaling":{{"rope_type":"proportional"}}}}"#
                ),
                "rope_type 'proportional'",
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
        const LONGROPE: &str = r#""rope_scaling":{"rope_type":"longrope","short_factor":[1,2]"#;
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
            (
                r#""rope_scaling":{"rope_type":"longrope","short_factor":[1,2]}"#.to_owned(),
                "long_factor of the rotary settings is missing",
            ),
            (
                format!(r#"{LONGROPE},"long_factor":[1]}}"#),
                "long_factor has 1 numbers",
            ),
            (format!(r#"{LONGROPE},"long_factor":[1,0]}}"#), "long_factor is 0"),
            (
                format!(r#"{LONGROPE},"long_factor":[1,2],"original_max_position_embeddings":1}}"#),
                "attention_factor is inf",
            ),
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

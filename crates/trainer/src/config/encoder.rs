//! `config.json` of the encoders of the BERT family.

use serde::Deserialize;

use super::layers;
use super::model::Activation;
use super::parse::{Field, Refusal, need, unsupported};
use crate::json::parse_object;

/// What the encoder needs of a model of the BERT family (`bert`, `roberta`, `xlm-roberta`), with transformers' defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// `model_type`.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of attention, each of width `hidden_size / num_attention_heads`.
    pub num_attention_heads: usize,
    /// The feed-forward layer's nonlinearity.
    pub hidden_act: Activation,
    /// Added to the variance in the norms.
    pub layer_norm_eps: f64,
    /// Rows of the table of positions.
    pub max_position_embeddings: usize,
    /// Rows of the table of segments, of which the first is used.
    pub type_vocab_size: usize,
    /// Whether the head of masked language modelling shares the embedding table.
    pub tie_word_embeddings: bool,
    /// The embedding's `padding_idx`.
    pub pad_token_id: Option<u32>,
}

/// `config.json` as it is written.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    pad_token_id: Field<i64>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

/// Parses the bytes of an encoder's `config.json`.
pub(crate) fn config(json: &[u8]) -> Result<EncoderConfig, Refusal> {
    let raw = parse_object(json);
    EncoderConfig::from_raw(raw.map_err(|reason| Refusal::Invalid(format!("not a model config: {reason}")))?)
}

impl EncoderConfig {
    /// Whether this crate implements the family as an encoder.
    pub(crate) fn is_family(model_type: &str) -> bool {
        matches!(model_type, "bert" | "roberta" | "xlm-roberta")
    }

    fn from_raw(raw: Raw) -> Result<Self, Refusal> {
        let model_type = raw.model_type.unwrap_or_default();
        if !Self::is_family(&model_type) {
            return Err(unsupported(
                "model_type",
                &model_type,
                "the encoder implements model_type bert, roberta and xlm-roberta",
            ));
        }
        if let Some(kind) = raw
            .position_embedding_type
            .filter(|kind| kind.as_str() != "absolute")
        {
            return Err(unsupported(
                "position_embedding_type",
                &kind,
                "the encoder implements absolute positions",
            ));
        }
        if raw.is_decoder {
            return Err(unsupported(
                "is_decoder",
                "true",
                "the encoder sees all of a text at once",
            ));
        }
        let pad_token_id = raw.pad_token_id.or(Some(i64::from(model_type != "bert")));
        let config = Self {
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size: need("hidden_size", raw.hidden_size)?,
            intermediate_size: need("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: need("num_hidden_layers", raw.num_hidden_layers)?,
            num_attention_heads: need("num_attention_heads", raw.num_attention_heads)?,
            hidden_act: match raw.hidden_act.as_deref() {
                None => Activation::Gelu,
                Some(name) => layers::named("hidden_act", name)?,
            },
            layer_norm_eps: raw.layer_norm_eps.unwrap_or(1e-12),
            max_position_embeddings: need(
                "max_position_embeddings",
                raw.max_position_embeddings.or(Some(512)),
            )?,
            type_vocab_size: need("type_vocab_size", raw.type_vocab_size.or(Some(2)))?,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(true),
            pad_token_id: pad_token_id.and_then(|id| u32::try_from(id).ok()),
            model_type,
        };
        config.check().map_err(Refusal::Invalid)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if !hidden.is_multiple_of(heads) {
            return Err(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            ));
        }
        if let Some(id) = self.pad_token_id.filter(|id| *id as usize >= self.vocab_size) {
            return Err(format!(
                "pad_token_id {id} is outside vocab_size {}",
                self.vocab_size
            ));
        }
        if self.counts_positions_after_padding() && self.pad_token_id.is_none() {
            return Err("pad_token_id is null, but positions are counted from it".to_owned());
        }
        if self.max_length() == 0 {
            return Err(format!(
                "max_position_embeddings {} leaves no position after pad_token_id",
                self.max_position_embeddings
            ));
        }
        if !(self.layer_norm_eps >= 0.0 && self.layer_norm_eps.is_finite()) {
            return Err(format!(
                "layer_norm_eps is {}, expected 0 or more",
                self.layer_norm_eps
            ));
        }
        Ok(())
    }

    /// Whether the first token's position is that after `pad_token_id`, and padding's is `pad_token_id` (`roberta`). BERT
    /// counts from 0.
    pub(crate) fn counts_positions_after_padding(&self) -> bool {
        self.model_type != "bert"
    }

    /// Longest sequence.
    pub fn max_length(&self) -> usize {
        if self.counts_positions_after_padding() {
            let taken = self.pad_token_id.map_or(0, |id| id as usize + 1);
            self.max_position_embeddings.saturating_sub(taken)
        } else {
            self.max_position_embeddings
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &str) -> Result<EncoderConfig, Refusal> {
        const SIZES: &str = r#""vocab_size":10,"hidden_size":8,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":2,"max_position_embeddings":6"#;
        config(format!("{{{SIZES},{fields}}}").as_bytes())
    }

    #[test]
    fn defaults_are_transformers() {
        let bert = parse(r#""model_type":"bert""#).unwrap();
        assert_eq!((bert.pad_token_id, bert.max_length()), (Some(0), 6));
        assert_eq!(
            (bert.tie_word_embeddings, bert.type_vocab_size, bert.hidden_act),
            (true, 2, Activation::Gelu)
        );
        let roberta = parse(r#""model_type":"roberta""#).unwrap();
        assert_eq!((roberta.pad_token_id, roberta.max_length()), (Some(1), 4));
        assert_eq!(
            parse(r#""model_type":"bert","pad_token_id":null"#)
                .unwrap()
                .pad_token_id,
            None
        );
    }

    #[test]
    fn what_is_not_implemented_or_impossible_is_refused_by_name() {
        for (fields, name) in [
            (r#""model_type":"deberta""#, "model_type 'deberta'"),
            (
                r#""model_type":"bert","position_embedding_type":"relative_key""#,
                "position_embedding_type 'relative_key'",
            ),
            (r#""model_type":"bert","is_decoder":true"#, "is_decoder"),
            (
                r#""model_type":"bert","hidden_act":"quick_gelu""#,
                "hidden_act 'quick_gelu'",
            ),
            (
                r#""model_type":"bert","pad_token_id":10"#,
                "pad_token_id 10 is outside",
            ),
            (
                r#""model_type":"roberta","pad_token_id":null"#,
                "pad_token_id is null",
            ),
            (r#""model_type":"roberta","pad_token_id":5"#, "leaves no position"),
            (
                r#""model_type":"bert","layer_norm_eps":-1"#,
                "layer_norm_eps is -1",
            ),
        ] {
            let (Refusal::Invalid(message) | Refusal::Unsupported { what: message, .. }) =
                parse(fields).unwrap_err();
            assert!(message.contains(name), "{message}");
        }
        let odd = br#"{"model_type":"bert","vocab_size":10,"hidden_size":9,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":2}"#;
        assert!(matches!(config(odd), Err(Refusal::Invalid(reason)) if reason.contains("not a multiple")));
    }
}

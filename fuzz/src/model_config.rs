//! `config.json` of a model.

use trainable_tokens_format::{AdapterConfig, ModelTables, TargetModules};

use crate::adapter::base;
use crate::check_message;
use crate::trainer::encoder;
use crate::trainer::model::{LayerType, ModelConfig, Positions, Rope, RopeScaling};
use crate::trainer::parse::{self, Refusal};

/// The input is a config, of a decoder or of an encoder.
///
/// A config that is accepted can be computed with: sizes do not overflow, and every number is finite.
pub fn model_config(input: &[u8]) {
    check_tables(input);
    if let Some(config) = accepted(parse::config(input)) {
        check_decoder(&config);
    }
    if let Some(config) = accepted(encoder::config(input)) {
        assert!(config.vocab_size > 0 && config.intermediate_size > 0 && config.num_hidden_layers > 0);
        assert!(config.hidden_size.is_multiple_of(config.num_attention_heads));
        assert!(config.max_length() > 0 && config.max_length() <= config.max_position_embeddings);
        assert!(config.layer_norm_eps.is_finite() && config.layer_norm_eps >= 0.0);
        assert!(is_token(config.pad_token_id, config.vocab_size));
    }
}

fn accepted<T>(config: Result<T, Refusal>) -> Option<T> {
    match config {
        Ok(config) => return Some(config),
        Err(Refusal::Invalid(reason)) => check_message(&reason),
        Err(Refusal::Unsupported { what, hint }) => check_message(&format!("{what}: {hint}")),
    }
    None
}

fn is_token(id: Option<u32>, vocab_size: usize) -> bool {
    id.is_none_or(|id| (id as usize) < vocab_size)
}

fn check_decoder(config: &ModelConfig) {
    let width = config.num_attention_heads.checked_mul(config.head_dim);
    assert!(width.is_some());
    assert!(
        config
            .num_attention_heads
            .is_multiple_of(config.num_key_value_heads)
    );
    assert!(config.vocab_size > 0 && config.hidden_size > 0 && config.intermediate_size > 0);
    assert!(config.num_hidden_layers > 0 && config.layer_types.len() == config.num_hidden_layers);
    assert!(config.max_length() >= config.max_position_embeddings && config.max_position_embeddings > 0);
    let slides = config.layer_types.contains(&LayerType::Sliding);
    assert!(!slides || config.sliding_window.is_some_and(|window| window > 0));
    assert!(is_token(config.pad_token_id, config.vocab_size));
    assert!(config.norm_eps.is_finite() && config.norm_eps >= 0.0);
    let above_0 = [
        config.embed_scale,
        Some(config.query_pre_attn_scalar),
        config.attn_logit_softcapping,
        config.final_logit_softcapping,
    ];
    let mut above_0 = above_0.into_iter().flatten();
    assert!(above_0.all(|factor| factor.is_finite() && factor > 0.0));
    if let Positions::Rotary { full, sliding } = &config.positions {
        assert!(config.head_dim.is_multiple_of(2));
        check_rope(full);
        check_rope(sliding);
    }
}

fn check_rope(rope: &Rope) {
    let factors = match rope.scaling.clone() {
        RopeScaling::Default => Vec::new(),
        RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => vec![factor],
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            assert!(low_freq_factor < high_freq_factor);
            vec![
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            ]
        }
        RopeScaling::Yarn {
            factor,
            attention_factor,
            original_max_position_embeddings,
            ..
        } => vec![factor, attention_factor, original_max_position_embeddings],
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            attention_factor,
            original_max_position_embeddings,
        } => {
            assert_eq!(short_factor.len(), long_factor.len());
            let others = [attention_factor, original_max_position_embeddings];
            [&short_factor[..], &long_factor, &others].concat()
        }
    };
    let mut all = factors.into_iter().chain([rope.theta]);
    assert!(all.all(|factor| factor.is_finite() && factor > 0.0), "{rope:?}");
}

/// What the config says about the tables of a checkpoint.
fn check_tables(config: &[u8]) {
    let tables = match ModelTables::from_parts(base(), Some(config.to_vec())) {
        Ok(tables) => tables,
        Err(error) => return check_message(&error.to_string()),
    };
    assert!(
        tables
            .input_embedding()
            .is_none_or(|path| tables.paths().any(|other| other == path))
    );
    let targets = TargetModules::from(["emb", "lm_head"]);
    let adapter = AdapterConfig::new(&[3, 1], &targets).expect("two tokens");
    match tables.targets(&adapter) {
        Ok(found) => assert!(!found.is_empty()),
        Err(error) => check_message(&error.to_string()),
    }
}

//! `config.json` of a model.

use trainable_tokens_format::{AdapterConfig, ModelTables, TargetModules};

use crate::adapter::base;
use crate::check_message;
use crate::trainer::model::RopeScaling;
use crate::trainer::parse::{Refusal, config};

/// The input is a config.
///
/// A config that is accepted can be computed with: sizes do not overflow, and every number is finite.
pub fn model_config(input: &[u8]) {
    check_tables(input);
    let config = match config(input) {
        Ok(config) => config,
        Err(Refusal::Invalid(reason)) => return check_message(&reason),
        Err(Refusal::Unsupported { what, hint }) => return check_message(&format!("{what}: {hint}")),
    };
    let width = config.num_attention_heads.checked_mul(config.head_dim);
    assert!(width.is_some());
    assert!(
        config
            .num_attention_heads
            .is_multiple_of(config.num_key_value_heads)
    );
    assert!(config.vocab_size > 0 && config.hidden_size > 0 && config.intermediate_size > 0);
    assert!(config.head_dim.is_multiple_of(2) && config.num_hidden_layers > 0);
    assert!(config.max_position_embeddings > 0 && config.sliding_window != Some(0));
    assert!(
        config
            .pad_token_id
            .is_none_or(|id| (id as usize) < config.vocab_size)
    );
    assert!(config.rms_norm_eps.is_finite() && config.rms_norm_eps >= 0.0);
    assert!(config.rope_theta.is_finite() && config.rope_theta > 0.0);
    let factors = match config.rope_scaling {
        RopeScaling::Default => Vec::new(),
        RopeScaling::Linear { factor } => vec![factor],
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
    };
    assert!(factors.iter().all(|factor| factor.is_finite() && *factor > 0.0));
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

//! Sizes of the model and the files that describe it.

use std::{fs, path::Path};

use anyhow::Result;
use serde_json::json;

use crate::tokenizer::{BOS, EOS, PAD, VOCAB};

/// Width of the residual stream.
pub(crate) const HIDDEN: usize = 128;

/// Width of the feed-forward layers.
pub(crate) const INTERMEDIATE: usize = 256;

/// Number of layers.
pub(crate) const LAYERS: usize = 3;

/// Number of query heads.
pub(crate) const HEADS: usize = 4;

/// Number of key and value heads.
pub(crate) const KV_HEADS: usize = 2;

/// Width of a head.
pub(crate) const HEAD_DIM: usize = HIDDEN / HEADS;

/// Longest sequence.
pub(crate) const CONTEXT: usize = 128;

/// Epsilon of the norms.
pub(crate) const EPS: f64 = 1e-5;

/// Base of the rotary frequencies.
pub(crate) const THETA: f32 = 10_000.;

/// Standard deviation of the initial weights.
pub(crate) const INIT: f32 = 0.05;

/// Writes `config.json` and `generation_config.json` under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be written.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.05,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": PAD,
        "pretraining_tp": 1,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "use_cache": true,
        "vocab_size": VOCAB,
    });
    fs::write(
        dir.join("config.json"),
        serde_json::to_string_pretty(&config)? + "\n",
    )?;
    let generation = json!({
        "_from_model_config": true,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    });
    fs::write(
        dir.join("generation_config.json"),
        serde_json::to_string_pretty(&generation)? + "\n",
    )?;
    Ok(())
}

//! Grouped-query attention (Ainslie et al. 2023).

use candle_core::Tensor;
use candle_nn::Module;

use super::linear::Linear;
use super::weights::Weights;
use crate::ops::{AttentionKind, Mask, Rotation, attention};
use crate::{ModelConfig, Result};

#[derive(Debug)]
pub(super) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_heads: usize,
    key_heads: usize,
    head_dim: usize,
    mask: Mask,
}

impl Attention {
    pub(super) fn load(weights: &Weights<'_>, config: &ModelConfig, module: &str) -> Result<Self> {
        let (hidden, bias) = (config.hidden_size, config.attention_bias);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let linear = |name: &str, out, input| weights.linear(&format!("{module}.{name}"), out, input, bias);
        Ok(Self {
            query: linear("q_proj", queries, hidden)?,
            key: linear("k_proj", keys, hidden)?,
            value: linear("v_proj", keys, hidden)?,
            output: linear("o_proj", hidden, queries)?,
            query_heads: config.num_attention_heads,
            key_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            mask: Mask::causal(config.sliding_window),
        })
    }

    /// Its linear layers.
    pub(super) fn linear(&self) -> [&Linear; 4] {
        [&self.query, &self.key, &self.value, &self.output]
    }

    /// `[B, L, D]` to `[B, L, D]`.
    pub(super) fn forward(&self, hidden: &Tensor, rotation: &Rotation) -> Result<Tensor> {
        let (query, key) = (self.query.forward(hidden)?, self.key.forward(hidden)?);
        let value = self.value.forward(hidden)?;
        let kind = AttentionKind {
            query_heads: self.query_heads,
            key_heads: self.key_heads,
            scale: 1.0 / (self.head_dim as f64).sqrt(),
            softcap: None,
            mask: self.mask,
            lengths: None,
            rotation: Some(rotation.clone()),
        };
        let mixed = attention(&query, &key, &value, &kind)?;
        Ok(self.output.forward(&mixed)?)
    }
}

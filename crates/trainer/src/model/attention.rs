//! Grouped-query attention (Ainslie et al. 2023).

use candle_core::Tensor;
use candle_nn::Module;

use super::linear::Linear;
use super::rotary::Positions;
use super::weights::Weights;
use crate::ops::{add_frozen, softmax};
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
        })
    }

    /// `[B, L, D]` to `[B, L, D]`.
    pub(super) fn forward(&self, hidden: &Tensor, positions: &Positions) -> Result<Tensor> {
        let (batch, length, _) = hidden.dims3()?;
        let heads = |projected: Tensor, heads: usize| {
            projected
                .reshape((batch, length, heads, self.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let query = positions.rotate(&heads(self.query.forward(hidden)?, self.query_heads)?)?;
        let key = positions.rotate(&heads(self.key.forward(hidden)?, self.key_heads)?)?;
        let value = heads(self.value.forward(hidden)?, self.key_heads)?;

        // The query heads of a group lie one after the other, so a group's scores are one product, without
        // repeating keys and values.
        let group = self.query_heads / self.key_heads * length;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let query = (query.reshape((batch, self.key_heads, group, self.head_dim))? * scale)?;
        let scores =
            query
                .matmul(&key.transpose(2, 3)?)?
                .reshape((batch, self.query_heads, length, length))?;
        let weights = softmax(&add_frozen(&scores, &positions.mask)?)?;
        let mixed = weights
            .reshape((batch, self.key_heads, group, length))?
            .matmul(&value)?;
        let mixed = mixed
            .reshape((batch, self.query_heads, length, self.head_dim))?
            .transpose(1, 2)?;
        Ok(self
            .output
            .forward(&mixed.reshape((batch, length, self.query_heads * self.head_dim))?)?)
    }
}

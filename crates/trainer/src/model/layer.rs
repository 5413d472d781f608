//! A layer: attention and a feed-forward layer, each added to what it reads.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache;

use super::attention::Attention;
use super::linear::Linear;
use super::mlp::Mlp;
use super::norm;
use super::rotary::Rotations;
use super::weights::Weights;
use crate::ops::Norm;
use crate::{ModelConfig, Result};

#[derive(Debug)]
pub(super) struct Layer {
    attention_norm: Norm,
    attention: Attention,
    post_attention_norm: Option<Norm>,
    mlp_norm: Norm,
    mlp: Mlp,
    post_mlp_norm: Option<Norm>,
}

impl Layer {
    pub(super) fn load(weights: &Weights<'_>, config: &ModelConfig, index: usize) -> Result<Self> {
        let names = &config.names.layer;
        let path = format!("{}.{index}", config.names.layers);
        let norm = |name: &str| norm::load(weights, config, &format!("{path}.{name}"), config.hidden_size);
        Ok(Self {
            attention_norm: norm(names.attention_norm)?,
            attention: Attention::load(weights, config, &path, index)?,
            post_attention_norm: names.post_attention_norm.map(norm).transpose()?,
            mlp_norm: norm(names.mlp_norm)?,
            mlp: Mlp::load(weights, config, &path)?,
            post_mlp_norm: names.post_mlp_norm.map(norm).transpose()?,
        })
    }

    /// What trains in it.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        let linear = self.attention.linear().chain(self.mlp.linear());
        linear.flat_map(Linear::leaves)
    }

    /// `[B, Q, D]` to `[B, Q, D]`. With a cache, the positions follow those that it holds, and are added to it.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        rotations: &Rotations,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let attended = self
            .attention
            .forward(&self.attention_norm.forward(hidden)?, rotations, cache)?;
        let hidden = (hidden + normed(self.post_attention_norm.as_ref(), attended)?)?;
        let transformed = self.mlp.forward(&self.mlp_norm.forward(&hidden)?)?;
        Ok((&hidden + normed(self.post_mlp_norm.as_ref(), transformed)?)?)
    }
}

fn normed(norm: Option<&Norm>, x: Tensor) -> Result<Tensor> {
    Ok(match norm {
        Some(norm) => norm.forward(&x)?,
        None => x,
    })
}

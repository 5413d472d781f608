//! Grouped-query attention (Ainslie et al. 2023).

use candle_core::{D, Tensor};
use candle_nn::Module;
use candle_nn::kv_cache::KvCache;

use super::linear::Linear;
use super::rotary::Rotations;
use super::weights::Weights;
use crate::config::{LayerType, ProjectionNames};
use crate::ops::{AttentionKind, Mask, Norm, attention};
use crate::{ModelConfig, Result};

#[derive(Debug)]
pub(super) struct Attention {
    projections: Projections,
    /// The norms of each head of queries and keys.
    head_norms: Option<[Norm; 2]>,
    output: Linear,
    layer_type: LayerType,
    kind: AttentionKind,
}

/// The layers that make queries, keys and values.
#[derive(Debug)]
enum Projections {
    Separate(Box<[Linear; 3]>),
    /// One, its outputs one after the other.
    Fused(Linear),
}

impl Attention {
    /// Loads the attention of layer number `index`, whose path is `layer`.
    pub(super) fn load(
        weights: &Weights<'_>,
        config: &ModelConfig,
        layer: &str,
        index: usize,
    ) -> Result<Self> {
        let names = &config.names.layer;
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let linear =
            |name: &str, out_in, bias| weights.linear(&format!("{layer}.{name}"), out_in, bias, names.layout);
        let projections = match &names.projections {
            ProjectionNames::Separate([query, key, value]) => Projections::Separate(Box::new([
                linear(query, [queries, hidden], config.qkv_bias)?,
                linear(key, [keys, hidden], config.qkv_bias)?,
                linear(value, [keys, hidden], config.qkv_bias)?,
            ])),
            ProjectionNames::Fused(name) => {
                Projections::Fused(linear(name, [queries + 2 * keys, hidden], config.qkv_bias)?)
            }
        };
        let norm =
            |name: &str| super::norm::load(weights, config, &format!("{layer}.{name}"), config.head_dim);
        let head_norms = match names.head_norms {
            Some([query, key]) => Some([norm(query)?, norm(key)?]),
            None => None,
        };
        let layer_type = config.layer_types.get(index).copied().unwrap_or(LayerType::Full);
        let window = config.sliding_window.filter(|_| layer_type == LayerType::Sliding);
        Ok(Self {
            projections,
            head_norms,
            output: linear(names.output, [hidden, queries], config.output_bias)?,
            layer_type,
            kind: AttentionKind {
                query_heads: config.num_attention_heads,
                key_heads: config.num_key_value_heads,
                scale: 1.0 / config.query_pre_attn_scalar.sqrt(),
                softcap: config.attn_logit_softcapping,
                mask: Mask::causal(window),
                lengths: None,
                rotation: None,
            },
        })
    }

    /// Its linear layers.
    pub(super) fn linear(&self) -> impl Iterator<Item = &Linear> {
        let projections = match &self.projections {
            Projections::Separate(layers) => &layers[..],
            Projections::Fused(layer) => std::slice::from_ref(layer),
        };
        projections.iter().chain([&self.output])
    }

    /// `[B, Q, D]` to `[B, Q, D]`. With a cache, the positions follow those that it holds, and are added to it.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        rotations: &Rotations,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let [query, key, value] = self.project(hidden)?;
        let (key, value) = match cache {
            Some(cache) => cache.append(&key.contiguous()?, &value.contiguous()?)?,
            None => (key, value),
        };
        let kind = AttentionKind {
            rotation: rotations.of(self.layer_type).cloned(),
            ..self.kind.clone()
        };
        let mixed = attention(&query, &key, &value, &kind)?;
        Ok(self.output.forward(&mixed)?)
    }

    /// Queries, keys and values, not yet rotated.
    fn project(&self, hidden: &Tensor) -> Result<[Tensor; 3]> {
        let [query, key, value] = match &self.projections {
            Projections::Separate(layers) => {
                let [query, key, value] = &**layers;
                [
                    query.forward(hidden)?,
                    key.forward(hidden)?,
                    value.forward(hidden)?,
                ]
            }
            Projections::Fused(layer) => {
                let all = layer.forward(hidden)?;
                let (queries, keys) = (self.kind.query_heads, self.kind.key_heads);
                let head_dim = all.dim(D::Minus1)? / (queries + 2 * keys);
                let part =
                    |start: usize, heads: usize| all.narrow(D::Minus1, start * head_dim, heads * head_dim);
                [
                    part(0, queries)?,
                    part(queries, keys)?,
                    part(queries + keys, keys)?,
                ]
            }
        };
        let Some([query_norm, key_norm]) = &self.head_norms else {
            return Ok([query, key, value]);
        };
        let of_heads = |norm: &Norm, x: &Tensor, heads: usize| -> Result<Tensor> {
            let (batch, length, width) = x.dims3()?;
            let heads = x.reshape((batch, length, heads, width / heads))?;
            Ok(norm.forward(&heads)?.reshape((batch, length, width))?)
        };
        Ok([
            of_heads(query_norm, &query, self.kind.query_heads)?,
            of_heads(key_norm, &key, self.kind.key_heads)?,
            value,
        ])
    }
}

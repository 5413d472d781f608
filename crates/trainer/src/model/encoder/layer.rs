//! One layer: attention and feed-forward, each followed by a norm (Vaswani et al. 2017).

use std::sync::Arc;

use candle_core::Tensor;
use candle_nn::Module;

use crate::config::{Activation, EncoderConfig, WeightLayout};
use crate::model::linear::Linear;
use crate::model::weights::Weights;
use crate::ops::{AttentionKind, Mask, Norm, activate, attention};
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
    heads: usize,
    head_dim: usize,
    activation: Activation,
}

/// Loads the norm of a module. Old checkpoints of BERT call the weight `gamma` and the bias `beta`; transformers renames
/// them as it loads them.
pub(super) fn norm(weights: &Weights<'_>, module: &str, config: &EncoderConfig) -> Result<Norm> {
    let tensor = |name: &str, old: &str| {
        let [name, old] = [name, old].map(|name| format!("{module}.{name}"));
        let name = if weights.contains(&old) { old } else { name };
        weights.tensor(&name, &[config.hidden_size])
    };
    Ok(Norm::Layer {
        weight: tensor("weight", "gamma")?,
        bias: tensor("bias", "beta")?,
        eps: config.layer_norm_eps,
    })
}

impl Layer {
    pub(super) fn load(weights: &Weights<'_>, config: &EncoderConfig, module: &str) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |name: &str, out, input| {
            weights.linear(
                &format!("{module}.{name}"),
                [out, input],
                true,
                WeightLayout::OutIn,
            )
        };
        let norm = |name: &str| norm(weights, &format!("{module}.{name}"), config);
        Ok(Self {
            query: linear("attention.self.query", hidden, hidden)?,
            key: linear("attention.self.key", hidden, hidden)?,
            value: linear("attention.self.value", hidden, hidden)?,
            attention_output: linear("attention.output.dense", hidden, hidden)?,
            attention_norm: norm("attention.output.LayerNorm")?,
            intermediate: linear("intermediate.dense", inner, hidden)?,
            output: linear("output.dense", hidden, inner)?,
            output_norm: norm("output.LayerNorm")?,
            heads: config.num_attention_heads,
            head_dim: hidden / config.num_attention_heads,
            activation: config.hidden_act,
        })
    }

    /// What trains in it.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        let linear = [
            &self.query,
            &self.key,
            &self.value,
            &self.attention_output,
            &self.intermediate,
            &self.output,
        ];
        linear.into_iter().flat_map(Linear::leaves)
    }

    /// `[B, L, D]` to `[B, L, D]`; of each example, queries see the keys of its first `lengths` positions.
    pub(super) fn forward(&self, hidden: &Tensor, lengths: Option<&Arc<[usize]>>) -> Result<Tensor> {
        let kind = AttentionKind {
            query_heads: self.heads,
            key_heads: self.heads,
            scale: 1.0 / (self.head_dim as f64).sqrt(),
            softcap: None,
            mask: Mask::ALL,
            lengths: lengths.cloned(),
            rotation: None,
        };
        let [query, key, value] =
            [&self.query, &self.key, &self.value].map(|projection| projection.forward(hidden));
        let mixed = attention(&query?, &key?, &value?, &kind)?;
        let attended = self.attention_output.forward(&mixed)?;
        let hidden = self.attention_norm.forward(&(attended + hidden)?)?;
        let inner = activate(self.activation, &self.intermediate.forward(&hidden)?)?;
        let transformed = self.output.forward(&inner)?;
        self.output_norm
            .forward(&(transformed + hidden)?)
            .map_err(Error::from)
    }
}

//! The feed-forward layer, gated (Shazeer 2020) or not.

use candle_core::Tensor;
use candle_nn::Module;

use super::linear::Linear;
use super::weights::Weights;
use crate::config::Activation;
use crate::ops::{activate, gate};
use crate::{ModelConfig, Result};

#[derive(Debug)]
pub(super) struct Mlp {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl Mlp {
    pub(super) fn load(weights: &Weights<'_>, config: &ModelConfig, layer: &str) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let names = &config.names.layer;
        let linear = |name: &str, out_in| {
            let module = format!("{layer}.{name}");
            weights.linear(&module, out_in, config.mlp_bias, names.layout)
        };
        Ok(Self {
            gate: names.gate.map(|name| linear(name, [inner, hidden])).transpose()?,
            up: linear(names.up, [inner, hidden])?,
            down: linear(names.down, [hidden, inner])?,
            activation: config.activation,
        })
    }

    /// Its linear layers.
    pub(super) fn linear(&self) -> impl Iterator<Item = &Linear> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    pub(super) fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let up = self.up.forward(hidden)?;
        let inner = match &self.gate {
            Some(layer) => gate(self.activation, &layer.forward(hidden)?, &up)?,
            None => activate(self.activation, &up)?,
        };
        Ok(self.down.forward(&inner)?)
    }
}

//! The gated feed-forward layer (Shazeer 2020).

use candle_core::Tensor;
use candle_nn::Module;

use super::linear::Linear;
use super::weights::Weights;
use crate::ops::silu_gate;
use crate::{ModelConfig, Result};

#[derive(Debug)]
pub(super) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    pub(super) fn load(weights: &Weights<'_>, config: &ModelConfig, module: &str) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear =
            |name: &str, out, input| weights.linear(&format!("{module}.{name}"), out, input, config.mlp_bias);
        Ok(Self {
            gate: linear("gate_proj", inner, hidden)?,
            up: linear("up_proj", inner, hidden)?,
            down: linear("down_proj", hidden, inner)?,
        })
    }

    /// Its linear layers.
    pub(super) fn linear(&self) -> [&Linear; 3] {
        [&self.gate, &self.up, &self.down]
    }

    pub(super) fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let gated = silu_gate(&self.gate.forward(hidden)?, &self.up.forward(hidden)?)?;
        Ok(self.down.forward(&gated)?)
    }
}

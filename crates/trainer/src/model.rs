//! Models, differentiable everywhere, frozen but for the trainable tokens.

mod attention;
mod cache;
mod encoder;
mod head;
mod layer;
mod linear;
mod load;
mod mlp;
mod norm;
mod rotary;
mod weights;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::{CrossEntropyOptions, LogitsChunk, Softcap};

pub use self::cache::KeyValueCache;
pub(crate) use self::encoder::Names;
pub use self::encoder::{Encoder, Pooling, PoolingMode};
use self::head::Head;
use self::layer::Layer;
pub use self::linear::LowRank;
use self::rotary::{Rotary, Rotations};
use crate::ops::{Norm, add_frozen, recompute};
use crate::{Error, Graph, ModelConfig, Result};

/// A causal language model of which only the rows of some tokens train, and weights of LoRA where an adapter has some.
///
/// Every linear layer is a [`FrozenLinear`](trainable_tokens_candle::FrozenLinear) and every norm's weight is captured: a backward pass makes gradients
/// of activations and of what trains, never of a frozen weight.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: TrainableTokens,
    /// The table of learned positions, `[positions, D]`.
    positions: Option<Tensor>,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    head: Head,
    rotary: Option<Rotary>,
    logits_softcap: Option<Softcap>,
    low_rank: Vec<LowRank>,
    device: Device,
    num_parameters: usize,
    recomputes: bool,
    logits_chunk: LogitsChunk,
}

impl Decoder {
    /// Sets whether the activations of a layer are computed again in the backward pass instead of kept. That costs
    /// another forward pass of the layers, but then only each layer's input is kept. The loss is the same.
    #[must_use]
    pub fn with_recomputation(mut self, recomputes: bool) -> Self {
        self.recomputes = recomputes;
        self
    }

    /// Sets how many rows of logits exist at once in a loss.
    #[must_use]
    pub fn with_logits_chunk(mut self, chunk: LogitsChunk) -> Self {
        self.logits_chunk = chunk;
        self
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The embedding, whose rows train.
    pub fn embedding(&self) -> &TrainableTokens {
        &self.embedding
    }

    /// The embedding, to step its rows.
    pub fn embedding_mut(&mut self) -> &mut TrainableTokens {
        &mut self.embedding
    }

    /// The untied head, if rows of its own train.
    pub fn head_rows(&self) -> Option<&TrainableTokens> {
        self.head.rows()
    }

    /// The weights of LoRA, in the order of the layers.
    pub fn low_rank(&self) -> &[LowRank] {
        &self.low_rank
    }

    /// Parameters of the checkpoint, frozen or not; a tied table counts once.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the embedding module returns for `input_ids` `[B, L]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// A token out of range; candle's errors.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        Ok(self.embedding.forward(input_ids)?)
    }

    /// The last hidden states, normed, of `embeddings` `[B, L, D]`: `[B, L, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a sequence longer than the model takes; candle's errors.
    pub fn hidden(&self, embeddings: &Tensor) -> Result<Tensor> {
        let (_, length, _) = embeddings.dims3()?;
        self.expect_length(length)?;
        let (hidden, rotations) = self.positioned(embeddings, 0)?;
        let forward = move |layer: &Layer, x: &Tensor| layer.forward(x, &rotations, None);
        let leaves = |layer: &Layer| layer.leaves().cloned().collect();
        let hidden = through(&self.layers, hidden, self.recomputes, leaves, forward)?;
        Ok(self.norm.forward(&hidden)?)
    }

    fn expect_length(&self, length: usize) -> Result<()> {
        let most = self.config.max_length();
        if length <= most {
            return Ok(());
        }
        Err(Error::Setting(format!(
            "a sequence of {length} tokens is longer than the model's {most} positions"
        )))
    }

    /// What the first layer reads of embeddings whose positions begin at `start`, and the rotations up to their last.
    fn positioned(&self, embeddings: &Tensor, start: usize) -> Result<(Tensor, Rotations)> {
        let (_, length, _) = embeddings.dims3()?;
        let hidden = match &self.positions {
            Some(positions) => add_frozen(embeddings, &positions.narrow(0, start, length)?)?,
            None => embeddings.clone(),
        };
        let rotations = match &self.rotary {
            Some(rotary) => rotary.rotations(start + length, hidden.dtype(), hidden.device())?,
            None => Rotations::default(),
        };
        Ok((hidden, rotations))
    }

    /// The logits of hidden states `[.., D]`: `[.., V]`.
    ///
    /// # Errors
    ///
    /// Candle's errors.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.logits(hidden, self.logits_softcap)
    }

    /// The mean cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`: the id that it must
    /// predict, or -100 for none. The logits are never held at once, but for a head with weights of LoRA. Without a graph no
    /// gradient is prepared.
    ///
    /// # Errors
    ///
    /// A label out of range, or no label; candle's errors.
    pub fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, graph: Graph) -> Result<Tensor> {
        let options = CrossEntropyOptions {
            softcap: self.logits_softcap,
            chunk: self.logits_chunk,
            ..CrossEntropyOptions::default()
        };
        self.head.cross_entropy(hidden, labels, options, graph)
    }
}

/// `hidden` through layers, one after the other. With recomputation each keeps its input alone for the backward pass;
/// `leaves` are what trains in a layer.
fn through<L: Send + Sync + 'static>(
    layers: &[Arc<L>],
    mut hidden: Tensor,
    recomputes: bool,
    leaves: impl Fn(&L) -> Vec<Tensor>,
    forward: impl Fn(&L, &Tensor) -> Result<Tensor> + Clone + Send + Sync + 'static,
) -> Result<Tensor> {
    for layer in layers {
        hidden = if recomputes {
            let leaves = if hidden.track_op() {
                leaves(layer)
            } else {
                Vec::new()
            };
            let (layer, forward) = (layer.clone(), forward.clone());
            let block = move |x: &Tensor| forward(&layer, x).map_err(candle_core::Error::wrap);
            recompute(&hidden, &leaves, Arc::new(block))?
        } else {
            forward(layer, &hidden)?
        };
    }
    Ok(hidden)
}

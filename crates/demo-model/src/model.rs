//! The Llama forward pass in operations that candle differentiates.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, safetensors};
use candle_nn::ops::{silu, softmax};

use crate::config::{CONTEXT, EPS, HEAD_DIM, HEADS, KV_HEADS, LAYERS, THETA};

/// Name of the embedding matrix, which is the output matrix too.
pub(crate) const EMBED: &str = "model.embed_tokens.weight";

/// Weights by name, with the tables of the rotary embedding and the causal mask.
#[derive(Debug)]
pub(crate) struct Model {
    /// All weights under their Hugging Face names.
    pub(crate) weights: BTreeMap<String, Tensor>,
    /// Cosines, context by head width.
    cos: Tensor,
    /// Sines, context by head width.
    sin: Tensor,
    /// Zero where a position may look, very negative elsewhere.
    mask: Tensor,
}

impl Model {
    /// A model over the given weights.
    pub(crate) fn new(weights: BTreeMap<String, Tensor>) -> Result<Self> {
        let device = &Device::Cpu;
        let dim = u16::try_from(HEAD_DIM)?;
        let freqs: Vec<f32> = (0..dim)
            .step_by(2)
            .map(|i| THETA.powf(-f32::from(i) / f32::from(dim)))
            .collect();
        let time = Tensor::arange(0u32, u32::try_from(CONTEXT)?, device)?.to_dtype(DType::F32)?;
        let half = time
            .unsqueeze(1)?
            .matmul(&Tensor::new(freqs, device)?.unsqueeze(0)?)?;
        let angles = Tensor::cat(&[&half, &half], 1)?;
        let mask: Vec<f32> = (0..CONTEXT * CONTEXT)
            .map(|i| if i % CONTEXT > i / CONTEXT { -1e9 } else { 0. })
            .collect();
        let mask = Tensor::from_vec(mask, (CONTEXT, CONTEXT), device)?;
        Ok(Self {
            weights,
            cos: angles.cos()?,
            sin: angles.sin()?,
            mask,
        })
    }

    /// Loads a saved model in single precision.
    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let saved = safetensors::load(dir.join("model.safetensors"), &Device::Cpu)?;
        let cast = |(name, t): (String, Tensor)| Ok((name, t.to_dtype(DType::F32)?));
        Self::new(saved.into_iter().map(cast).collect::<Result<_>>()?)
    }

    /// Saves the weights in bfloat16, `rows` appended to the embedding.
    pub(crate) fn save(&self, rows: &Tensor, dir: &Path) -> Result<()> {
        let mut out = BTreeMap::new();
        for (name, value) in &self.weights {
            let value = if name == EMBED {
                Tensor::cat(&[value, rows], 0)?
            } else {
                value.clone()
            };
            out.insert(name.clone(), value.to_dtype(DType::BF16)?);
        }
        let meta = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        fs::write(
            dir.join("model.safetensors"),
            ::safetensors::serialize(out, Some(meta))?,
        )?;
        Ok(())
    }

    /// A weight by name.
    pub(crate) fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights
            .get(name)
            .with_context(|| format!("no weight {name}"))
    }

    /// Final hidden states, (batch * time, hidden), of `ids`, (batch, time), looked up in `embed`.
    pub(crate) fn hidden(&self, embed: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let (batch, time) = ids.dims2()?;
        let mut x = embed.index_select(&ids.flatten_all()?, 0)?;
        for i in 0..LAYERS {
            x = (&x + self.attention(&x, i, batch, time)?)?;
            x = (&x + self.feed_forward(&x, i)?)?;
        }
        rms_norm(&x, self.weight("model.norm.weight")?)
    }

    /// What the attention of layer `i` adds to `x`.
    fn attention(&self, x: &Tensor, i: usize, batch: usize, time: usize) -> Result<Tensor> {
        let weight = |name: &str| self.weight(&format!("model.layers.{i}.{name}.weight"));
        let x = rms_norm(x, weight("input_layernorm")?)?;
        let query = heads(&linear(&x, weight("self_attn.q_proj")?)?, batch, HEADS)?;
        let key = heads(&linear(&x, weight("self_attn.k_proj")?)?, batch, KV_HEADS)?;
        let value = heads(&linear(&x, weight("self_attn.v_proj")?)?, batch, KV_HEADS)?;
        let key = repeat(&self.rotate(&key)?)?;
        let scale = f64::from(u32::try_from(HEAD_DIM)?).sqrt().recip();
        let scores = (self.rotate(&query)?.matmul(&key.t()?)? * scale)?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        let mixed = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&repeat(&value)?)?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch * time, HEADS * HEAD_DIM))?;
        linear(&mixed, weight("self_attn.o_proj")?)
    }

    /// What the feed-forward part of layer `i` adds to `x`.
    fn feed_forward(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        let weight = |name: &str| self.weight(&format!("model.layers.{i}.{name}.weight"));
        let x = rms_norm(x, weight("post_attention_layernorm")?)?;
        let gate = silu(&linear(&x, weight("mlp.gate_proj")?)?)?;
        linear(
            &(gate * linear(&x, weight("mlp.up_proj")?)?)?,
            weight("mlp.down_proj")?,
        )
    }

    /// Rotates queries or keys, (batch, heads, time, width), by their positions.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (time, half) = (x.dim(2)?, HEAD_DIM / 2);
        let (cos, sin) = (self.cos.narrow(0, 0, time)?, self.sin.narrow(0, 0, time)?);
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let turned = Tensor::cat(&[&b.neg()?, &a], 3)?;
        Ok((x.broadcast_mul(&cos)? + turned.broadcast_mul(&sin)?)?)
    }
}

/// A linear layer without bias.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&weight.t()?)?)
}

/// Root-mean-square norm.
fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    Ok(x.broadcast_div(&scale)?.broadcast_mul(weight)?)
}

/// Splits (batch * time, width) into (batch, heads, time, head width).
fn heads(x: &Tensor, batch: usize, heads: usize) -> Result<Tensor> {
    let time = x.dim(0)? / batch;
    Ok(x.reshape((batch, time, heads, HEAD_DIM))?
        .transpose(1, 2)?
        .contiguous()?)
}

/// Gives each query head its key or value head.
fn repeat(x: &Tensor) -> Result<Tensor> {
    let (batch, _, time, width) = x.dims4()?;
    let groups = x
        .unsqueeze(2)?
        .broadcast_as((batch, KV_HEADS, HEADS / KV_HEADS, time, width))?;
    Ok(groups.reshape((batch, HEADS, time, width))?)
}

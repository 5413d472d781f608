//! The Llama forward pass in operations that candle differentiates.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var, safetensors};
use candle_nn::ops::{silu, softmax};
use rand::{Rng, rngs::StdRng};

use crate::{
    config::{CONTEXT, EPS, HEAD_DIM, HEADS, HIDDEN, INIT, INTERMEDIATE, KV_HEADS, LAYERS, THETA},
    tokenizer::VOCAB,
};

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

/// Names and shapes of the weights except the embedding.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut out = vec![("model.norm.weight".to_owned(), vec![HIDDEN])];
    for i in 0..LAYERS {
        let mut push = |name: &str, shape: &[usize]| {
            out.push((format!("model.layers.{i}.{name}.weight"), shape.to_vec()));
        };
        push("input_layernorm", &[HIDDEN]);
        push("self_attn.q_proj", &[q, HIDDEN]);
        push("self_attn.k_proj", &[kv, HIDDEN]);
        push("self_attn.v_proj", &[kv, HIDDEN]);
        push("self_attn.o_proj", &[HIDDEN, q]);
        push("post_attention_layernorm", &[HIDDEN]);
        push("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]);
        push("mlp.up_proj", &[INTERMEDIATE, HIDDEN]);
        push("mlp.down_proj", &[HIDDEN, INTERMEDIATE]);
    }
    out
}

/// Normally distributed values of standard deviation [`INIT`].
pub(crate) fn normal(shape: &[usize], rng: &mut StdRng) -> Result<Tensor> {
    let mut draw = || {
        let (u, v): (f32, f32) = (rng.random(), rng.random());
        INIT * (-2. * (1. - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Fresh trainable weights; the embedding has no rows for the two new tokens.
pub(crate) fn fresh(rng: &mut StdRng) -> Result<BTreeMap<String, Var>> {
    let mut out = BTreeMap::new();
    out.insert(EMBED.to_owned(), Var::from_tensor(&normal(&[VOCAB - 2, HIDDEN], rng)?)?);
    for (name, shape) in shapes() {
        let value = match shape.len() {
            1 => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
            _ => normal(&shape, rng)?,
        };
        out.insert(name, Var::from_tensor(&value)?);
    }
    Ok(out)
}

impl Model {
    /// A model over the given weights.
    pub(crate) fn new(weights: BTreeMap<String, Tensor>) -> Result<Self> {
        let device = &Device::Cpu;
        let dim = u16::try_from(HEAD_DIM)?;
        let freqs: Vec<f32> =
            (0..dim).step_by(2).map(|i| THETA.powf(-f32::from(i) / f32::from(dim))).collect();
        let time = Tensor::arange(0u32, u32::try_from(CONTEXT)?, device)?.to_dtype(DType::F32)?;
        let half = time.unsqueeze(1)?.matmul(&Tensor::new(freqs, device)?.unsqueeze(0)?)?;
        let angles = Tensor::cat(&[&half, &half], 1)?;
        let mask: Vec<f32> =
            (0..CONTEXT * CONTEXT).map(|i| if i % CONTEXT > i / CONTEXT { -1e9 } else { 0. }).collect();
        let mask = Tensor::from_vec(mask, (CONTEXT, CONTEXT), device)?;
        Ok(Self { weights, cos: angles.cos()?, sin: angles.sin()?, mask })
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
            let value = if name == EMBED { Tensor::cat(&[value, rows], 0)? } else { value.clone() };
            out.insert(name.clone(), value.to_dtype(DType::BF16)?);
        }
        let meta = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        ::safetensors::serialize_to_file(out, Some(meta), &dir.join("model.safetensors"))?;
        Ok(())
    }

    /// A weight by name.
    pub(crate) fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(name).with_context(|| format!("no weight {name}"))
    }

    /// Final hidden states, (batch * time, hidden), of `ids`, (batch, time), looked up in `embed`.
    pub(crate) fn hidden(&self, embed: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let (batch, time) = ids.dims2()?;
        let mut x = embed.index_select(&ids.flatten_all()?, 0)?;
        for i in 0..LAYERS {
            let w = |name: &str| self.weight(&format!("model.layers.{i}.{name}.weight"));
            let h = rms_norm(&x, w("input_layernorm")?)?;
            let q = self.rotate(&heads(&linear(&h, w("self_attn.q_proj")?)?, batch, HEADS)?)?;
            let k = self.rotate(&heads(&linear(&h, w("self_attn.k_proj")?)?, batch, KV_HEADS)?)?;
            let v = heads(&linear(&h, w("self_attn.v_proj")?)?, batch, KV_HEADS)?;
            let scale = f64::from(u32::try_from(HEAD_DIM)?).sqrt().recip();
            let scores = (q.matmul(&repeat(&k)?.t()?)? * scale)?;
            let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
            let attention = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&repeat(&v)?)?;
            let h = attention.transpose(1, 2)?.reshape((batch * time, HEADS * HEAD_DIM))?;
            x = (x + linear(&h, w("self_attn.o_proj")?)?)?;
            let h = rms_norm(&x, w("post_attention_layernorm")?)?;
            let gate = silu(&linear(&h, w("mlp.gate_proj")?)?)?;
            let h = (gate * linear(&h, w("mlp.up_proj")?)?)?;
            x = (x + linear(&h, w("mlp.down_proj")?)?)?;
        }
        rms_norm(&x, self.weight("model.norm.weight")?)
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
    Ok(x.reshape((batch, time, heads, HEAD_DIM))?.transpose(1, 2)?.contiguous()?)
}

/// Gives each query head its key or value head.
fn repeat(x: &Tensor) -> Result<Tensor> {
    let (batch, _, time, width) = x.dims4()?;
    let groups = x.unsqueeze(2)?.broadcast_as((batch, KV_HEADS, HEADS / KV_HEADS, time, width))?;
    Ok(groups.reshape((batch, HEADS, time, width))?)
}

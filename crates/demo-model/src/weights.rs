//! Fresh weights.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, rngs::StdRng};

use crate::{
    config::{HEAD_DIM, HEADS, HIDDEN, INIT, INTERMEDIATE, KV_HEADS, LAYERS},
    model::EMBED,
    tokenizer::VOCAB,
};

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
    out.insert(
        EMBED.to_owned(),
        Var::from_tensor(&normal(&[VOCAB - 2, HIDDEN], rng)?)?,
    );
    for (name, shape) in shapes() {
        let value = match shape.len() {
            1 => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
            _ => normal(&shape, rng)?,
        };
        out.insert(name, Var::from_tensor(&value)?);
    }
    Ok(out)
}

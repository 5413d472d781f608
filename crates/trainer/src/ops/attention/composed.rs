//! Attention, composed of candle's operations.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{AttentionKind, Mask};
use crate::ops::frozen::add_frozen;
use crate::ops::working_dtype;

/// See [`attention`](super::attention).
pub(crate) fn composed(query: &Tensor, key: &Tensor, value: &Tensor, kind: &AttentionKind) -> Result<Tensor> {
    let (batch, queries, width) = query.dims3()?;
    let (_, length, _) = key.dims3()?;
    let head_dim = width / kind.query_heads;
    let heads = |projected: &Tensor, heads: usize| {
        projected
            .reshape((batch, (), heads, head_dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let rotated = |heads: Tensor| match &kind.rotation {
        Some(rotation) => rotation.composed(&heads),
        None => Ok(heads),
    };
    let query = rotated(heads(query, kind.query_heads)?)?;
    let key = rotated(heads(key, kind.key_heads)?)?;
    let value = heads(value, kind.key_heads)?;

    // The query heads of a group lie one after the other, so a group's scores are one product, without
    // repeating keys and values.
    let group = kind.query_heads / kind.key_heads * queries;
    let query = (query.reshape((batch, kind.key_heads, group, head_dim))? * kind.scale)?;
    let scores = query.matmul(&key.transpose(2, 3)?)?;
    let scores = match kind.softcap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = scores.reshape((batch, kind.query_heads, queries, length))?;
    let mask = mask(kind.mask, [queries, length], scores.dtype(), scores.device())?;
    let mask = match &kind.lengths {
        Some(lengths) => {
            mask.broadcast_minimum(&padding(lengths, length, scores.dtype(), scores.device())?)?
        }
        None => mask,
    };
    let weights = softmax(&add_frozen(&scores, &mask)?)?;
    let mixed = weights
        .reshape((batch, kind.key_heads, group, length))?
        .matmul(&value)?;
    let mixed = mixed
        .reshape((batch, kind.query_heads, queries, head_dim))?
        .transpose(1, 2)?;
    mixed.reshape((batch, queries, width))
}

/// `[Q, L]`, 0 where a query sees a key and the type's lowest number where not.
fn mask(mask: Mask, [queries, length]: [usize; 2], dtype: DType, device: &Device) -> Result<Tensor> {
    let lowest = lowest(dtype);
    // Positions are far below 2^24, so they are exact in `f32`.
    let position = Tensor::arange(0f32, length as f32, device)?;
    let of_queries = position.narrow(0, length - queries, queries)?;
    let offset = position.unsqueeze(0)?.broadcast_sub(&of_queries.unsqueeze(1)?)?;
    let hidden = Tensor::full(lowest, (queries, length), device)?;
    let seen = offset
        .ge(-(mask.behind as f64))?
        .where_cond(&hidden.zeros_like()?, &hidden)?;
    offset
        .le(mask.ahead as f64)?
        .where_cond(&seen, &hidden)?
        .to_dtype(dtype)
}

/// `[B, 1, 1, L]`, 0 where an example holds something and the type's lowest number behind that.
fn padding(lengths: &[usize], length: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let hidden = lowest(dtype);
    let row = |held: &usize| {
        let held = *held;
        (0..length).map(move |position| if position < held { 0.0 } else { hidden })
    };
    let values: Vec<f32> = lengths.iter().flat_map(row).collect();
    Tensor::from_vec(values, (lengths.len(), 1, 1, length), device)?.to_dtype(dtype)
}

fn lowest(dtype: DType) -> f32 {
    if dtype == DType::F16 {
        f32::from(half::f16::MIN)
    } else {
        f32::MIN
    }
}

/// Softmax over the last dimension.
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(working_dtype(dtype))?;
    let highest = x.detach().max_keepdim(D::Minus1)?.neg()?;
    let exponentials = add_frozen(&x, &highest)?.exp()?;
    exponentials
        .broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?
        .to_dtype(dtype)
}

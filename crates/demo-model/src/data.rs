//! Batches and the causal loss.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::loss::cross_entropy;
use rand::{rngs::StdRng, seq::SliceRandom};

use crate::{
    config::CONTEXT,
    model::{Model, linear},
    tokenizer::PAD,
};

/// Sequences padded to one length, and the positions that predict a token.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Inputs, (batch, time).
    ids: Tensor,
    /// Flat positions with a target.
    positions: Tensor,
    /// Target at each of those positions.
    targets: Tensor,
    /// Number of targets.
    pub(crate) count: u32,
}

impl Batch {
    /// Pads `sequences` on the right.
    pub(crate) fn new(sequences: &[&Vec<u32>]) -> Result<Self> {
        let time = sequences
            .iter()
            .map(|s| s.len())
            .max()
            .unwrap_or(0)
            .saturating_sub(1);
        ensure!((1..=CONTEXT).contains(&time), "sequences of {time} tokens");
        let (mut ids, mut positions, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for s in sequences {
            let base = u32::try_from(ids.len())?;
            ids.extend_from_slice(&s[..s.len() - 1]);
            ids.resize(ids.len() + time + 1 - s.len(), PAD);
            targets.extend_from_slice(&s[1..]);
            positions.extend(base..base + u32::try_from(s.len() - 1)?);
        }
        let count = u32::try_from(targets.len())?;
        let device = &Device::Cpu;
        let ids = Tensor::from_vec(ids, (sequences.len(), time), device)?;
        Ok(Self {
            ids,
            positions: Tensor::new(positions, device)?,
            targets: Tensor::new(targets, device)?,
            count,
        })
    }

    /// Mean cross entropy over the targets.
    pub(crate) fn loss(&self, model: &Model, embed: &Tensor) -> Result<Tensor> {
        let hidden = model.hidden(embed, &self.ids)?.index_select(&self.positions, 0)?;
        Ok(cross_entropy(&linear(&hidden, embed)?, &self.targets)?)
    }
}

/// One epoch of shuffled batches of about equally long sequences.
pub(crate) fn epoch(data: &[Vec<u32>], size: usize, rng: &mut StdRng) -> Result<Vec<Batch>> {
    let mut order: Vec<&Vec<u32>> = data.iter().collect();
    order.shuffle(rng);
    let mut batches = Vec::new();
    for chunk in order.chunks_mut(size * 16) {
        chunk.sort_by_key(|s| s.len());
        for batch in chunk.chunks(size) {
            batches.push(Batch::new(batch)?);
        }
    }
    batches.shuffle(rng);
    Ok(batches)
}

/// Mean loss over all targets of `data`.
pub(crate) fn evaluate(model: &Model, embed: &Tensor, data: &[Vec<u32>]) -> Result<f64> {
    let (mut sum, mut count) = (0., 0.);
    for chunk in data.chunks(16) {
        let batch = Batch::new(&chunk.iter().collect::<Vec<_>>())?;
        let n = f64::from(batch.count);
        sum += n * f64::from(batch.loss(model, embed)?.to_scalar::<f32>()?);
        count += n;
    }
    Ok(sum / count)
}

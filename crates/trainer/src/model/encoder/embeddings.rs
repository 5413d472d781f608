//! What an encoder adds to the rows of the tokens: segments, positions, a norm.

use candle_core::Tensor;

use super::layer::norm;
use crate::config::EncoderConfig;
use crate::model::weights::Weights;
use crate::ops::{Norm, add_frozen};
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct Embeddings {
    /// The row of the first segment, `[D]`: every token is in it.
    segment: Tensor,
    /// `[max_position_embeddings, D]`.
    positions: Tensor,
    norm: Norm,
    /// The token that has no position of its own, where positions are counted after it.
    padding: Option<u32>,
    max_length: usize,
}

impl Embeddings {
    pub(super) fn load(weights: &Weights<'_>, config: &EncoderConfig, module: &str) -> Result<Self> {
        let table = |name: &str, rows| {
            weights.tensor(&format!("{module}.{name}.weight"), &[rows, config.hidden_size])
        };
        Ok(Self {
            segment: table("token_type_embeddings", config.type_vocab_size)?.get(0)?,
            positions: table("position_embeddings", config.max_position_embeddings)?,
            norm: norm(weights, &format!("{module}.LayerNorm"), config)?,
            padding: config
                .pad_token_id
                .filter(|_| config.counts_positions_after_padding()),
            max_length: config.max_length(),
        })
    }

    /// `rows` `[B, L, D]` of the tokens `input_ids` `[B, L]` with all that is added to them: `[B, L, D]`.
    pub(super) fn forward(&self, rows: &Tensor, input_ids: &Tensor) -> Result<Tensor> {
        let (batch, length, dim) = rows.dims3()?;
        if length > self.max_length {
            let most = self.max_length;
            return Err(Error::Setting(format!(
                "a sequence of {length} tokens is longer than the model's {most} positions"
            )));
        }
        let positions = match self.padding {
            None => self.positions.narrow(0, 0, length)?.unsqueeze(0)?,
            Some(padding) => {
                let ids = input_ids.to_dtype(candle_core::DType::U32)?.to_vec2::<u32>()?;
                let positions: Vec<u32> = ids.iter().flat_map(|row| after_padding(row, padding)).collect();
                let positions = Tensor::from_vec(positions, batch * length, rows.device())?;
                self.positions
                    .index_select(&positions, 0)?
                    .reshape((batch, length, dim))?
            }
        };
        let rows = add_frozen(rows, &self.segment)?;
        Ok(self.norm.forward(&add_frozen(&rows, &positions)?)?)
    }
}

/// Transformers' `create_position_ids_from_input_ids`: tokens that are not padding are counted from `padding + 1`, and
/// padding is at position `padding`.
fn after_padding(ids: &[u32], padding: u32) -> impl Iterator<Item = u32> {
    let mut last = padding;
    ids.iter().map(move |id| {
        if *id == padding {
            return padding;
        }
        last += 1;
        last
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn padding_is_not_counted() {
        let positions = super::after_padding(&[9, 1, 8, 7, 1, 1], 1).collect::<Vec<_>>();
        assert_eq!(positions, [2, 1, 3, 4, 1, 1]);
    }
}

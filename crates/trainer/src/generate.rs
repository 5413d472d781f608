//! Greedy text generation.

use candle_core::{D, IndexOp, Tensor};

use crate::{Decoder, Result};

/// Appends the likeliest token up to `max_new_tokens` times, or until an end-of-text token, which is not appended.
/// Returns the new tokens. Every token runs the whole sequence: for short texts.
///
/// # Errors
///
/// A token out of range, an empty or too long sequence; candle's errors.
pub fn generate(model: &Decoder, prompt: &[u32], max_new_tokens: usize) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    let room = model.config().max_length().saturating_sub(ids.len());
    for _ in 0..max_new_tokens.min(room) {
        let input = Tensor::from_slice(&ids, (1, ids.len()), model.device())?;
        let hidden = model.hidden(&model.embed(&input)?.detach())?;
        let last = hidden.i((.., ids.len() - 1, ..))?;
        let next = model
            .logits(&last)?
            .detach()
            .argmax(D::Minus1)?
            .to_vec1::<u32>()?[0];
        if model.config().eos_token_ids.contains(&next) {
            break;
        }
        ids.push(next);
    }
    Ok(ids.split_off(prompt.len()))
}

//! The loss over a data set.

use serde::Serialize;

use crate::{Dataset, Decoder, Graph, Result, Sampler, causal_loss};

/// The loss of a model over a data set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean cross-entropy over all targets, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// How many targets there are.
    pub tokens: u64,
}

/// Runs a model over all examples of a data set, `batch_size` at a time, without a graph.
///
/// # Errors
///
/// Those of [`causal_loss`]; [`Error::Dataset`](crate::Error::Dataset) if no example has a target.
pub fn evaluate(model: &Decoder, data: &Dataset, batch_size: usize) -> Result<Evaluation> {
    let mut sampler = Sampler::new(data.examples().len(), batch_size.max(1), None, false);
    let (mut sum, mut tokens) = (0.0, 0u64);
    let mut last_error = None;
    for step in 0..sampler.steps_per_epoch() {
        // A batch without a target adds nothing; only a whole set without one is an error.
        let batch = match data.batch(&sampler.indices(step)) {
            Ok(batch) => batch,
            Err(error) => {
                last_error = Some(error);
                continue;
            }
        };
        let count = batch.targets().len() as u64;
        let loss = crate::loss::scalar(&causal_loss(model, &batch, Graph::Drop)?)?;
        let weight = count as f64;
        sum += loss * weight;
        tokens += count;
    }
    if let (0, Some(error)) = (tokens, last_error) {
        return Err(error);
    }
    let loss = sum / tokens as f64;
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        tokens,
    })
}

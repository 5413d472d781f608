//! The loss over a data set.

use serde::Serialize;

use crate::loss::scalar;
use crate::objective::Task;
use crate::{Dataset, Graph, LanguageModel, Objective, Result, Retrieval, Sampler};

/// The loss of a model over a data set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss over all targets; that of tokens is a cross-entropy, in nats.
    pub loss: f64,
    /// `exp(loss)`, where the loss is that of tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// How many targets there are.
    pub tokens: u64,
    /// How well sentences find their definitions, where those are taught.
    #[serde(flatten)]
    pub retrieval: Option<Retrieval>,
}

/// Runs a model over all examples of a data set, `batch_size` at a time, without a graph.
///
/// # Errors
///
/// [`Error::Setting`](crate::Error::Setting) and [`Error::Data`](crate::Error::Data) if the objective is not for the
/// model or the data; [`Error::Dataset`](crate::Error::Dataset) if no example has a target; candle's errors.
pub fn evaluate(
    model: &LanguageModel,
    data: &Dataset,
    objective: &Objective,
    batch_size: usize,
) -> Result<Evaluation> {
    let task = Task::new(objective.clone(), model, data)?;
    match (task.taught(), model.as_encoder()) {
        (Some((teach, definitions)), Some(encoder)) => {
            let (retrieval, embeddings) = Retrieval::measure(teach, encoder, data, definitions)?;
            let places: Vec<usize> = data.examples().iter().filter_map(|it| it.definition).collect();
            let (mut sum, mut start) = (0.0, 0);
            for places in places.chunks(batch_size.max(1)) {
                let embeddings = embeddings.narrow(0, start, places.len())?;
                sum += scalar(&teach.loss(&embeddings, definitions, places)?)? * places.len() as f64;
                start += places.len();
            }
            Ok(Evaluation {
                loss: sum / places.len() as f64,
                perplexity: None,
                tokens: places.len() as u64,
                retrieval: Some(retrieval),
            })
        }
        _ => evaluate_tokens(&task, model, data, batch_size),
    }
}

fn evaluate_tokens(
    task: &Task,
    model: &LanguageModel,
    data: &Dataset,
    batch_size: usize,
) -> Result<Evaluation> {
    let mut sampler = Sampler::new(data.examples().len(), batch_size.max(1), None, false);
    let (mut sum, mut tokens) = (0.0, 0u64);
    let mut last_error = None;
    for step in 0..sampler.steps_per_epoch() {
        // A batch without a target adds nothing; only a whole set without one is an error.
        let batch = match task.batch(model, data, &sampler.indices(step), 0) {
            Ok(batch) => batch,
            Err(error) => {
                last_error = Some(error);
                continue;
            }
        };
        let count = batch.targets().len() as u64;
        let loss = scalar(&task.loss(model, &batch, Graph::Drop)?)?;
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
        perplexity: Some(loss.exp()),
        tokens,
        retrieval: None,
    })
}

//! What a trainer saves of a run, and how it takes it up again.

use std::path::Path;

use serde::{Deserialize, Serialize};
use trainable_tokens_format::{Adapter, TrainingState};

use super::Trainer;
use crate::activity::SavedActivity;
use crate::early_stopping::Evaluations;
use crate::part::{self, Part};
use crate::{Error, Objective, OptimizerKind, Result};

/// What a run must share with the one it continues; kept in the training state.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct RunIdentity {
    optimizer: OptimizerKind,
    token_indices: Vec<u32>,
    num_examples: usize,
    batch_size: usize,
    #[serde(default = "one")]
    accumulate: usize,
    seed: u64,
    shuffle: bool,
    /// What trains beside the rows of these tokens.
    #[serde(default)]
    others: Vec<String>,
    #[serde(default = "causal")]
    objective: String,
    #[serde(default)]
    keep_best: bool,
}

/// What a training state holds besides the optimizer's memory.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    #[serde(flatten)]
    run: RunIdentity,
    #[serde(default)]
    evaluations: Evaluations,
    /// The digest of the values that it was saved beside.
    #[serde(default)]
    values: Option<String>,
    /// The digest of the examples.
    #[serde(default)]
    data: Option<String>,
    /// Absent in states from before it was saved, and for very many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    activity: Option<SavedActivity>,
}

fn one() -> usize {
    1
}

/// The only objective that there was before its name was saved.
fn causal() -> String {
    Objective::Causal.to_string()
}

impl Trainer {
    /// All that is needed, besides the rows, to continue the run.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the state cannot be written as JSON.
    pub fn training_state(&self) -> Result<TrainingState> {
        let saved = Saved {
            run: self.identity(),
            evaluations: self.evaluations,
            values: Some(part::digest(&self.parts, &self.values()?)),
            data: Some(self.data.digest().to_owned()),
            activity: self.activity.saved(),
        };
        let extra = serde_json::to_value(saved).map_err(|error| Error::Setting(error.to_string()))?;
        Ok(TrainingState {
            optimizer: part::state(&self.parts)?,
            extra,
        })
    }

    /// Continues a run from what it saved, its adapter and its state: the next step is the one that the run would have
    /// taken.
    ///
    /// # Errors
    ///
    /// [`Error::Resume`] if the state belongs to a run with another optimizer, objective, other tokens, data, batch size,
    /// seed or order, if other matrices train, or if the adapter is that of another step; [`Error::Setting`] if the adapter
    /// lacks one of them; core's errors if tensors
    /// do not fit.
    pub fn resume(&mut self, adapter: &Adapter, state: TrainingState, path: &Path) -> Result<()> {
        let refuse = |reason: String| Error::Resume {
            path: path.to_owned(),
            reason,
        };
        let Saved {
            run: saved,
            evaluations,
            values,
            data,
            activity,
        } = serde_json::from_value(state.extra)
            .map_err(|error| refuse(format!("is not the state of a training run: {error}")))?;
        let current = self.identity();
        if saved != current {
            return Err(refuse(format!(
                "is the state of another run: {}",
                saved.difference(&current)
            )));
        }
        if data.is_some_and(|data| data != self.data.digest()) {
            let reason = "is the state of another run: its examples are others, or in another order";
            return Err(refuse(reason.to_owned()));
        }
        let step = state.optimizer.step;
        if step > self.total_steps {
            return Err(refuse(format!(
                "has taken {step} steps already, of the {} asked for",
                self.total_steps
            )));
        }
        let found = part::digest(&self.parts, &part::values(&self.parts, adapter)?);
        if values.is_some_and(|values| values != found) {
            return Err(refuse(format!(
                "is not the state of the adapter beside it, but of other values, after step {step}"
            )));
        }
        let activity = activity.map(|saved| {
            let reason = || "does not hold the counts of as many tokens as train".to_owned();
            self.activity.continued(&saved).ok_or_else(|| refuse(reason()))
        });
        let activity = activity.transpose()?;
        part::load(&mut self.parts, state.optimizer, adapter)?;
        if let Some(activity) = activity {
            self.activity = activity;
        }
        self.step = step;
        self.evaluations = evaluations;
        Ok(())
    }

    fn identity(&self) -> RunIdentity {
        RunIdentity {
            optimizer: self.options.optimizer,
            token_indices: self.model.embedding().tokens().to_vec(),
            num_examples: self.data.examples().len(),
            batch_size: self.options.batch_size,
            accumulate: self.options.accumulate,
            seed: self.options.seed,
            shuffle: self.options.shuffle,
            others: self.others(),
            objective: self.task.objective().to_string(),
            keep_best: self.options.keep_best,
        }
    }

    /// What trains beside the rows of the input embedding.
    fn others(&self) -> Vec<String> {
        let others = self.parts.iter().filter(|part| !part.matrix().is_embedding());
        others.map(Part::describe).collect()
    }
}

impl RunIdentity {
    /// Names the first field that differs.
    fn difference(&self, current: &Self) -> String {
        let pairs = [
            (
                "optimizer",
                format!("{:?}", self.optimizer),
                format!("{:?}", current.optimizer),
            ),
            (
                "token ids",
                format!("{:?}", self.token_indices),
                format!("{:?}", current.token_indices),
            ),
            (
                "number of examples",
                self.num_examples.to_string(),
                current.num_examples.to_string(),
            ),
            (
                "batch size",
                self.batch_size.to_string(),
                current.batch_size.to_string(),
            ),
            (
                "number of accumulated batches",
                self.accumulate.to_string(),
                current.accumulate.to_string(),
            ),
            ("seed", self.seed.to_string(), current.seed.to_string()),
            ("shuffle", self.shuffle.to_string(), current.shuffle.to_string()),
            (
                "list of other trained weights",
                format!("{:?}", self.others),
                format!("{:?}", current.others),
            ),
            ("objective", self.objective.clone(), current.objective.clone()),
            (
                "choice to keep the best",
                self.keep_best.to_string(),
                current.keep_best.to_string(),
            ),
        ];
        let differs = pairs.into_iter().find(|(_, saved, current)| saved != current);
        differs.map_or_else(String::new, |(name, saved, current)| {
            format!("its {name} is {saved}, not {current}")
        })
    }
}

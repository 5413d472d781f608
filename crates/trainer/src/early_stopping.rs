//! What evaluations decide: when a run ends early, and which rows are the best.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Ends a run when the loss over evaluation data no longer falls (transformers' `EarlyStoppingCallback`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStopping {
    /// The run ends after this many evaluations in a row without an improvement.
    pub patience: u64,
    /// An evaluation is an improvement if its loss is below the best so far by more than this, in nats.
    pub min_delta: f64,
}

impl EarlyStopping {
    pub(crate) fn check(&self) -> Result<()> {
        if self.patience == 0 {
            return Err(Error::Setting(
                "early-stopping-patience must be at least 1".to_owned(),
            ));
        }
        if !(self.min_delta >= 0.0 && self.min_delta.is_finite()) {
            let message = format!(
                "early-stopping-min-delta is {}, but it must be at least 0",
                self.min_delta
            );
            return Err(Error::Setting(message));
        }
        Ok(())
    }
}

/// The evaluation with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// Steps taken before it.
    pub step: u64,
    /// Its loss, in nats.
    pub loss: f64,
}

/// What the evaluations of a run have shown so far; kept in the training state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluations {
    best: Option<BestEvaluation>,
    without_improvement: u64,
}

impl Evaluations {
    /// Adds an evaluation; whether its loss is the lowest. One that is not finite is no improvement.
    pub(crate) fn record(&mut self, step: u64, loss: f64, stopping: Option<EarlyStopping>) -> bool {
        let min_delta = stopping.map_or(0.0, |stopping| stopping.min_delta);
        let best = self.best.map_or(f64::INFINITY, |best| best.loss);
        if best - loss > min_delta {
            self.without_improvement = 0;
        } else {
            self.without_improvement = self.without_improvement.saturating_add(1);
        }
        let lowest = loss < best;
        if lowest {
            self.best = Some(BestEvaluation { step, loss });
        }
        lowest
    }

    pub(crate) fn best(&self) -> Option<BestEvaluation> {
        self.best
    }

    pub(crate) fn stop(&self, stopping: EarlyStopping) -> bool {
        self.without_improvement >= stopping.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of evaluations until the run ends, and the best of them.
    fn run(patience: u64, min_delta: f64, losses: &[f64]) -> (Option<usize>, Option<u64>) {
        let stopping = EarlyStopping { patience, min_delta };
        let mut evaluations = Evaluations::default();
        for (at, loss) in losses.iter().enumerate() {
            evaluations.record(at as u64, *loss, Some(stopping));
            if evaluations.stop(stopping) {
                return (Some(at + 1), evaluations.best().map(|best| best.step));
            }
        }
        (None, evaluations.best().map(|best| best.step))
    }

    /// The counts are those of `EarlyStoppingCallback` of transformers 5.23.0 beside `Trainer._determine_best_metric`, with
    /// the losses as `eval_loss`: the callback first, then the best metric.
    #[test]
    fn a_run_ends_where_that_of_transformers_does() {
        let losses = [5.0, 4.0, 4.5, 3.99, 3.98, 3.97, 3.0, 3.0, 3.5, 3.0];
        for (patience, min_delta, ends) in [
            (1, 0.0, Some(3)),
            (2, 0.0, Some(9)),
            (3, 0.0, Some(10)),
            (4, 0.0, None),
            (3, 0.05, Some(5)),
            (4, 0.05, Some(6)),
            (5, 0.05, None),
        ] {
            assert_eq!(
                run(patience, min_delta, &losses).0,
                ends,
                "{patience} {min_delta}"
            );
        }
        // The best is the lowest, however little it is below.
        assert_eq!(run(9, 10.0, &losses).1, Some(6));
    }

    #[test]
    fn what_is_not_finite_is_no_improvement() {
        assert_eq!(run(2, 0.0, &[f64::NAN, f64::INFINITY, 1.0]), (Some(2), None));
        assert_eq!(run(2, 0.0, &[3.0, f64::NAN, 2.0, f64::NAN]), (None, Some(2)));
    }
}

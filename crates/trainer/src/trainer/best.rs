//! What a trainer makes of evaluations: when to end, and which values to keep.

use trainable_tokens_core::TokenRows;
use trainable_tokens_format::Adapter;

use super::Trainer;
use crate::part::{self, Part};
use crate::{BestEvaluation, Error, Result};

impl Trainer {
    /// Takes note of a loss over evaluation data, of the rows as they are now; whether it is the lowest so far.
    ///
    /// # Errors
    ///
    /// Those of reading the rows.
    pub fn record_evaluation(&mut self, loss: f64) -> Result<bool> {
        let is_best = self
            .evaluations
            .record(self.step, loss, self.options.early_stopping);
        if is_best && self.options.keep_best {
            self.best = Some(self.values()?);
        }
        Ok(is_best)
    }

    /// The evaluation with the lowest loss, of those that were noted.
    pub fn best_evaluation(&self) -> Option<BestEvaluation> {
        self.evaluations.best()
    }

    /// Whether the evaluations that were noted end the run.
    pub fn stops_early(&self) -> bool {
        let stopping = self.options.early_stopping;
        stopping.is_some_and(|stopping| self.evaluations.stop(stopping))
    }

    /// Whether the values of an evaluation are remembered as the best.
    pub fn remembers_best(&self) -> bool {
        self.best.is_some()
    }

    /// Gives everything that trains the values of the best evaluation, if they are remembered.
    ///
    /// # Errors
    ///
    /// Those of writing the rows.
    pub fn restore_best(&mut self) -> Result<()> {
        match self.best.take() {
            None => Ok(()),
            Some(best) => self.set_values(&best),
        }
    }

    /// What `look` sees while everything that trains has the values of the best evaluation, if they are remembered.
    ///
    /// # Errors
    ///
    /// Those of `look`, and of reading and writing the rows.
    pub fn at_best<T, E: From<Error>>(&mut self, look: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let Some(best) = self.best.take() else {
            return look(self);
        };
        let now = self.values()?;
        self.set_values(&best)?;
        let seen = look(self);
        self.set_values(&now)?;
        self.best = Some(best);
        seen
    }

    /// Continues to remember the best values of a run that [`resume`](Self::resume) took up: those of `adapter`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the adapter lacks one of the matrices that train; core's errors if shapes do not fit.
    pub fn resume_best(&mut self, adapter: &Adapter) -> Result<()> {
        let now = self.values()?;
        part::load_values(&mut self.parts, adapter)?;
        self.best = Some(self.values()?);
        self.set_values(&now)
    }

    /// The values of all parts.
    pub(super) fn values(&self) -> Result<Vec<TokenRows>> {
        self.parts.iter().map(Part::read).collect()
    }

    fn set_values(&mut self, values: &[TokenRows]) -> Result<()> {
        part::write_all(&mut self.parts, values)
    }
}

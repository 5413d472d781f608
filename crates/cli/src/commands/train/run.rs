//! One training run: steps, metrics, saves, evaluations, and the closing table.

use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::Overwrite;
use trainable_tokens_trainer::{
    self as trainer, Dataset, GradientCheck, LoraOptions, LowRank, Objective, Retrieval, StepMetrics,
    Trainer, peak_rss_bytes,
};

use super::dead::warnings;
use super::metrics::Metrics;
use super::save::Stage;
use crate::history::{HELD_OUT, History, as_f64};
use crate::initial::Initial;
use crate::interrupt;
use crate::model::Model;
use crate::output::note;
use crate::summary::{End, Summary};

/// What a run needs besides its trainer.
pub(crate) struct Run<'a> {
    pub(crate) model: &'a Model,
    /// As the user named it, for `base_model_name_or_path`.
    pub(crate) model_dir: &'a Path,
    pub(crate) target_modules: &'a [String],
    /// What trains beside the rows.
    pub(crate) lora: Option<&'a LoraOptions>,
    pub(crate) initial: &'a Initial,
    pub(crate) outputs: Outputs<'a>,
    pub(crate) eval_data: Option<Dataset>,
    pub(crate) eval_every: Option<u64>,
    /// Whether the best adapter is what stays in the end.
    pub(crate) keep_best: bool,
    /// Steps without a gradient after which a row is warned of; 0 for never.
    pub(crate) warn_dead_after: u64,
}

/// Where a run writes.
pub(crate) struct Outputs<'a> {
    pub(crate) adapter: &'a Path,
    pub(crate) overwrite: Overwrite,
    pub(crate) metrics: Option<&'a Path>,
    pub(crate) report: Option<&'a Path>,
    /// Whether the run continues another, whose metrics it goes on with.
    pub(crate) resumes: bool,
    pub(crate) save_every: Option<u64>,
    /// The options of the run, to be written beside the adapter.
    pub(crate) config: &'a str,
}

/// What a run leaves besides its files.
pub(crate) struct RunReport {
    pub(crate) summary: Summary,
    pub(crate) history: History,
}

impl Run<'_> {
    /// Checks the gradient, takes all steps, saves.
    pub(crate) fn execute(&self, trainer: &mut Trainer) -> Result<RunReport> {
        let check = trainer.check_gradient()?;
        let retrieval_before = self.retrieval(trainer)?;
        let start = self.start(trainer)?;
        let mut history = History::default();
        // A resumed run has taken note of this evaluation before.
        self.evaluate(trainer, &mut history, !self.outputs.resumes)?;
        let resumed_at = self.outputs.resumes.then(|| trainer.steps_taken());
        let mut metrics = Metrics::open(self.outputs.metrics, resumed_at)?;
        let mut saved = None;
        let mut seconds = 0.0;
        let bar = progress(trainer);
        let end = loop {
            if let Some(end) = why_end(trainer) {
                break end;
            }
            let mut step = trainer.step().map_err(|error| self.with_saved(error, saved))?;
            let due = |every: Option<u64>| every.is_some_and(|every| step.step.is_multiple_of(every));
            let (save, evaluate) = (due(self.outputs.save_every), due(self.eval_every));
            if evaluate {
                step.eval_loss = self.evaluate(trainer, &mut history, true)?;
            }
            seconds += step.seconds;
            show(&bar, &step);
            for warning in warnings(trainer, &self.model.vocabulary, self.warn_dead_after)? {
                bar.suspend(|| note(&warning));
            }
            self.measure(trainer, &start, &step, &mut metrics, &mut history)?;
            if save && why_end(trainer).is_none() {
                self.save(trainer, self.overwrite(saved), Stage::UnderWay)?;
                saved = Some(step.step);
            }
        };
        bar.finish_and_clear();
        let last_step = trainer.steps_taken();
        if end == End::Interrupted {
            self.save(trainer, self.overwrite(saved), Stage::UnderWay)?;
        } else {
            let is_new = |(step, _): &(f64, f64)| *step < as_f64(last_step);
            if history.held_out.last().is_none_or(is_new) {
                self.evaluate(trainer, &mut history, self.keep_best)?;
            }
            trainer.restore_best()?;
            self.save(trainer, self.overwrite(saved), Stage::Ended)?;
        }
        let taken = as_f64(history.steps.len() as u64).max(1.0);
        let mut summary = Summary {
            retrieval_before,
            retrieval_after: self.retrieval(trainer)?,
            ..self.summary(trainer, check, seconds / taken, &history, end)?
        };
        self.close(trainer, &start, &mut summary, &mut metrics, &mut history)?;
        Ok(RunReport { summary, history })
    }

    /// What this run wrote itself, it replaces.
    fn overwrite(&self, saved: Option<u64>) -> Overwrite {
        match saved {
            Some(_) => Overwrite::Replace,
            None => self.outputs.overwrite,
        }
    }

    /// An error that ends the run, with where the last save is.
    fn with_saved(&self, error: trainer::Error, saved: Option<u64>) -> anyhow::Error {
        match saved {
            None => error.into(),
            Some(step) => {
                let dir = self.outputs.adapter.display();
                let message = format!("{error}; the adapter as it was after step {step} is in {dir}");
                anyhow::Error::new(error).context(message)
            }
        }
    }

    /// The held-out loss now, remembered, and taken note of where the run decides by it.
    fn evaluate(&self, trainer: &mut Trainer, history: &mut History, decides: bool) -> Result<Option<f64>> {
        let Some(data) = &self.eval_data else {
            return Ok(None);
        };
        let loss = trainer.evaluate(data)?.loss;
        history.held_out.push((as_f64(trainer.steps_taken()), loss));
        if decides {
            trainer.record_evaluation(loss)?;
        }
        Ok(Some(loss))
    }

    /// How well sentences find their definitions now, where those are taught: in the held-out data, or else in the
    /// training data.
    fn retrieval(&self, trainer: &Trainer) -> Result<Option<Retrieval>> {
        match trainer.objective() {
            Objective::Teach(_) => {
                let data = self.eval_data.as_ref().unwrap_or(trainer.data());
                Ok(trainer.evaluate(data)?.retrieval)
            }
            Objective::Causal | Objective::Masked(_) => Ok(None),
        }
    }

    fn summary(
        &self,
        trainer: &Trainer,
        check: GradientCheck,
        seconds_per_step: f64,
        history: &History,
        end: End,
    ) -> Result<Summary> {
        let table = self.model.table()?;
        let rows = trainer.model().embedding().tokens().len();
        let lora = trainer.model().low_rank();
        let (loss_of, losses) = if history.held_out.is_empty() {
            ("first and last training batch", history.training())
        } else {
            (HELD_OUT, history.held_out.clone())
        };
        let loss = |at: Option<&(f64, f64)>| at.map_or(f64::NAN, |(_, loss)| *loss);
        let best = trainer.best_evaluation();
        let kept = best.filter(|_| self.keep_best && end != End::Interrupted);
        let file = self.outputs.adapter.join("adapter_model.safetensors");
        Ok(Summary {
            adapter: self.outputs.adapter.to_owned(),
            init: self.initial.text.clone(),
            steps: trainer.steps_taken(),
            rows_trained: rows,
            vocab_size: table.vocab_size(),
            parameters_trained: rows * table.embedding_dim()
                + lora.iter().map(LowRank::num_parameters).sum::<usize>(),
            lora_modules: lora.len(),
            parameters_total: trainer.model().num_parameters(),
            adapter_bytes: std::fs::metadata(&file)
                .with_context(|| format!("cannot read {}", file.display()))?
                .len(),
            table_bytes: table.bytes().len() as u64,
            loss_of,
            loss_before: loss(losses.first()),
            loss_after: kept.map_or_else(|| loss(losses.last()), |best| best.loss),
            end,
            kept_step: kept.map_or_else(|| trainer.steps_taken(), |best| best.step),
            best_step: best.map(|best| best.step),
            best_eval_loss: best.map(|best| best.loss),
            largest_untouched_change: trainer.largest_base_change(&self.model.checkpoint)?,
            seconds_per_step,
            peak_rss_bytes: peak_rss_bytes(),
            gradient_check_error: check.relative_error,
            gradient_check_uncertainty: check.uncertainty,
            objective: trainer.objective().name(),
            retrieval_before: None,
            retrieval_after: None,
            tokens: Vec::new(),
            dead_tokens: Vec::new(),
        })
    }
}

/// Whether the run has come to an end, and which.
fn why_end(trainer: &Trainer) -> Option<End> {
    if trainer.steps_taken() >= trainer.total_steps() {
        Some(End::LastStep)
    } else if trainer.stops_early() {
        Some(End::EarlyStopping)
    } else if interrupt::requested() {
        Some(End::Interrupted)
    } else {
        None
    }
}

/// A bar on standard error, if that is a terminal.
fn progress(trainer: &Trainer) -> ProgressBar {
    let bar = ProgressBar::new(trainer.total_steps()).with_position(trainer.steps_taken());
    match ProgressStyle::with_template("{bar:30} {pos}/{len} steps  {msg}  {eta} left") {
        Ok(style) => bar.set_style(style),
        Err(error) => note(&error.to_string()),
    }
    bar.reset_eta();
    bar
}

fn show(bar: &ProgressBar, step: &StepMetrics) {
    bar.set_message(format!(
        "loss {:.4}, {:.0} tokens/s",
        step.loss,
        as_f64(step.tokens) / step.seconds.max(1e-9)
    ));
    bar.set_position(step.step);
}

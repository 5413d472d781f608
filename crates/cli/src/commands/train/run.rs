//! One training run: steps, metrics, saves, evaluations, and the closing table.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use trainable_tokens_core::{EmbeddingSource, TokenRows, TokenSet};
use trainable_tokens_format::{Overwrite, write_dir_atomically, write_file_atomically};
use trainable_tokens_trainer::{
    Dataset, GradientCheck, LoraOptions, LowRank, StepMetrics, Trainer, peak_rss_bytes,
};

use super::dead::{dead_tokens, warnings};
use crate::args::options_in_force;
use crate::history::{HELD_OUT, History, StepLine, as_f64};
use crate::initial::Initial;
use crate::model::Model;
use crate::output::note;
use crate::report::page;
use crate::rows::{RowReport, norms_and_drifts, row_reports, token_name};
use crate::summary::Summary;

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
    /// Steps without a gradient after which a row is warned of; 0 for never.
    pub(crate) warn_dead_after: u64,
}

/// Where a run writes.
pub(crate) struct Outputs<'a> {
    pub(crate) adapter: &'a Path,
    pub(crate) overwrite: Overwrite,
    pub(crate) metrics: Option<&'a Path>,
    pub(crate) report: Option<&'a Path>,
    pub(crate) append_metrics: bool,
    pub(crate) save_every: Option<u64>,
}

/// What a run leaves besides its files.
pub(crate) struct RunReport {
    pub(crate) summary: Summary,
    pub(crate) history: History,
}

/// Tokens whose rows are measured at each step, at most: with more, none are.
const MOST_MEASURED: usize = 64;

/// A line of the metrics file.
#[derive(Serialize)]
struct MetricsLine<'a> {
    #[serde(flatten)]
    step: &'a StepMetrics,
    /// The L2 norm of each row after the step, and its distance from where it started, in slot order.
    #[serde(skip_serializing_if = "<[f64]>::is_empty")]
    row_norms: &'a [f64],
    #[serde(skip_serializing_if = "<[f64]>::is_empty")]
    row_drifts: &'a [f64],
}

#[derive(Serialize)]
struct SummaryLine<'a> {
    summary: &'a Summary,
}

impl Run<'_> {
    /// Checks the gradient, takes all steps, saves.
    pub(crate) fn execute(&self, trainer: &mut Trainer) -> Result<RunReport> {
        let check = trainer.check_gradient()?;
        let start = self.start(trainer)?;
        let mut history = History::default();
        self.evaluate(trainer, &mut history)?;
        let mut metrics = self.open_metrics()?;
        let mut saved = false;
        let mut seconds = 0.0;
        let bar = progress(trainer);
        while trainer.steps_taken() < trainer.total_steps() {
            let mut step = trainer.step()?;
            let due = |every: Option<u64>| every.is_some_and(|every| step.step.is_multiple_of(every));
            let (save, evaluate) = (due(self.outputs.save_every), due(self.eval_every));
            if evaluate {
                step.eval_loss = self.evaluate(trainer, &mut history)?;
            }
            seconds += step.seconds;
            show(&bar, &step);
            for warning in warnings(trainer, &self.model.vocabulary, self.warn_dead_after)? {
                bar.suspend(|| note(&warning));
            }
            let line = self.measure(trainer, &start, &step)?;
            write_line(
                &mut metrics,
                &MetricsLine {
                    step: &step,
                    row_norms: &line.row_norms,
                    row_drifts: &line.row_drifts,
                },
            )?;
            history.steps.push(line);
            if save && step.step < trainer.total_steps() {
                self.save(trainer, saved)?;
                saved = true;
            }
        }
        bar.finish_and_clear();
        let last = history.held_out.last().map(|(step, _)| *step);
        if last.is_none_or(|step| step < as_f64(trainer.steps_taken())) {
            self.evaluate(trainer, &mut history)?;
        }
        self.save(trainer, saved)?;
        let taken = as_f64(history.steps.len() as u64).max(1.0);
        let mut summary = self.summary(trainer, check, seconds / taken, &history)?;
        summary.dead_tokens = dead_tokens(trainer, &self.model.vocabulary)?;
        summary.tokens = self.row_reports(trainer, &start)?;
        let names = summary.tokens.iter();
        let names = names.map(|row| token_name(row.token_id, row.token.as_deref()));
        history.tokens = names.collect();
        write_line(&mut metrics, &SummaryLine { summary: &summary })?;
        if let Some(path) = self.outputs.report {
            let page = page(&summary, &history, &options_in_force())?;
            write_file_atomically(path, Overwrite::Replace, |file| -> Result<()> {
                file.write_all(page.as_bytes())
                    .with_context(|| format!("cannot write {}", path.display()))
            })?;
        }
        Ok(RunReport { summary, history })
    }

    /// The rows that the run started from, those of a resumed run too.
    fn start(&self, trainer: &Trainer) -> Result<TokenRows> {
        let table = self.model.table()?;
        let tokens = TokenSet::new(trainer.model().embedding().tokens().to_vec(), table.vocab_size())?;
        self.initial.rows(&table, &tokens)
    }

    /// What a step did, and where the rows are after it.
    fn measure(&self, trainer: &Trainer, start: &TokenRows, step: &StepMetrics) -> Result<StepLine> {
        let watched = self.outputs.metrics.is_some() || self.outputs.report.is_some();
        let (row_norms, row_drifts) = if watched && start.num_rows() <= MOST_MEASURED {
            norms_and_drifts(start, &trainer.model().embedding().rows()?)
        } else {
            (Vec::new(), Vec::new())
        };
        Ok(StepLine {
            step: step.step,
            loss: step.loss,
            lr: step.lr,
            grad_norm: step.grad_norm,
            eval_loss: step.eval_loss,
            row_norms,
            row_drifts,
        })
    }

    /// Where each row came from and went to.
    fn row_reports(&self, trainer: &Trainer, start: &TokenRows) -> Result<Vec<RowReport>> {
        let (table, layer) = (self.model.table()?, trainer.model().embedding());
        let vocabulary = &self.model.vocabulary;
        let string = |id| {
            if vocabulary.exists() {
                Ok(vocabulary.token(id)?)
            } else {
                Ok(None)
            }
        };
        row_reports(&table, layer.tokens().ids(), start, &layer.rows()?, string)
    }

    /// The held-out loss now, remembered.
    fn evaluate(&self, trainer: &Trainer, history: &mut History) -> Result<Option<f64>> {
        let Some(data) = &self.eval_data else {
            return Ok(None);
        };
        let loss = trainer.evaluate(data)?.loss;
        history.held_out.push((as_f64(trainer.steps_taken()), loss));
        Ok(Some(loss))
    }

    fn open_metrics(&self) -> Result<Option<(BufWriter<File>, String)>> {
        let Some(path) = self.outputs.metrics else {
            return Ok(None);
        };
        let mut options = OpenOptions::new();
        options.create(true).write(true);
        if self.outputs.append_metrics {
            options.append(true)
        } else {
            options.truncate(true)
        };
        let name = path.display().to_string();
        let file = options
            .open(path)
            .map_err(|error| anyhow!("cannot write metrics to {name}: {error}"))?;
        Ok(Some((BufWriter::new(file), name)))
    }

    /// Writes the adapter; a run that saves on the way keeps the state to resume from beside it.
    fn save(&self, trainer: &Trainer, replace: bool) -> Result<()> {
        let layer = trainer.model().embedding();
        let (tokens, rows) = (layer.tokens().to_vec(), layer.rows()?);
        // The loss tells only of the rows before the last step.
        if let Some((slot, column)) = rows.first_non_finite() {
            bail!(
                "the row of token id {} is not finite at column {column} after step {}: lower the learning rate",
                tokens.get(slot).copied().unwrap_or_default(),
                trainer.steps_taken()
            );
        }
        for low_rank in trainer.model().low_rank() {
            if !low_rank
                .read()?
                .iter()
                .all(|factor| factor.first_non_finite().is_none())
            {
                bail!(
                    "the weights of LoRA for {} are not finite after step {}: lower the learning rate",
                    low_rank.path(),
                    trainer.steps_taken()
                );
            }
        }
        let builder = self
            .model
            .adapter_builder(self.model_dir, &tokens, rows, self.initial)?;
        let builder = match self.lora {
            None => builder.target_modules(self.target_modules.to_vec()),
            Some(lora) => trainer.model().add_low_rank(builder.lora(lora.config()?))?,
        };
        let adapter = builder.build()?;
        let overwrite = if replace {
            Overwrite::Replace
        } else {
            self.outputs.overwrite
        };
        write_dir_atomically(self.outputs.adapter, overwrite, |dir| -> Result<()> {
            adapter.write_into(dir)?;
            if self.outputs.save_every.is_some() {
                trainer.training_state()?.write_into(dir)?;
            }
            Ok(())
        })
    }

    fn summary(
        &self,
        trainer: &Trainer,
        check: GradientCheck,
        seconds_per_step: f64,
        history: &History,
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
            loss_after: loss(losses.last()),
            largest_untouched_change: trainer.largest_base_change(&self.model.checkpoint)?,
            seconds_per_step,
            peak_rss_bytes: peak_rss_bytes(),
            gradient_check_error: check.relative_error,
            gradient_check_uncertainty: check.uncertainty,
            tokens: Vec::new(),
            dead_tokens: Vec::new(),
        })
    }
}

fn write_line(metrics: &mut Option<(BufWriter<File>, String)>, line: &impl Serialize) -> Result<()> {
    let Some((file, name)) = metrics else {
        return Ok(());
    };
    let text = serde_json::to_string(line)?;
    // Flushed at each line: what a run has measured survives its end, whatever that is.
    writeln!(file, "{text}")
        .and_then(|()| file.flush())
        .map_err(|error| anyhow!("cannot write metrics to {name}: {error}"))
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

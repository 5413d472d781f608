//! One training run: steps, metrics, saves, evaluations, and the closing table.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::{Overwrite, write_dir_atomically};
use trainable_tokens_trainer::{
    Dataset, GradientCheck, LoraOptions, LowRank, Objective, Retrieval, StepMetrics, Trainer, peak_rss_bytes,
};

use crate::initial::Initial;
use crate::model::Model;
use crate::output::note;
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
}

/// Where a run writes.
pub(crate) struct Outputs<'a> {
    pub(crate) adapter: &'a Path,
    pub(crate) overwrite: Overwrite,
    pub(crate) metrics: Option<&'a Path>,
    pub(crate) append_metrics: bool,
    pub(crate) save_every: Option<u64>,
}

/// What a run leaves besides its files.
pub(crate) struct RunReport {
    pub(crate) summary: Summary,
    /// (step, loss) of every training batch.
    pub(crate) training: Vec<(f64, f64)>,
    /// (step, loss) of every evaluation.
    pub(crate) held_out: Vec<(f64, f64)>,
}

#[derive(Serialize)]
struct SummaryLine<'a> {
    summary: &'a Summary,
}

impl Run<'_> {
    /// Checks the gradient, takes all steps, saves.
    pub(crate) fn execute(&self, trainer: &mut Trainer) -> Result<RunReport> {
        let check = trainer.check_gradient()?;
        let retrieval_before = self.retrieval(trainer)?;
        let mut held_out = Vec::new();
        self.evaluate(trainer, &mut held_out)?;
        let mut metrics = self.open_metrics()?;
        let mut saved = false;
        let mut training = Vec::new();
        let mut seconds = 0.0;
        let bar = progress(trainer);
        while trainer.steps_taken() < trainer.total_steps() {
            let mut step = trainer.step()?;
            let due = |every: Option<u64>| every.is_some_and(|every| step.step.is_multiple_of(every));
            let (save, evaluate) = (due(self.outputs.save_every), due(self.eval_every));
            if evaluate {
                step.eval_loss = self.evaluate(trainer, &mut held_out)?;
            }
            training.push((as_f64(step.step), step.loss));
            seconds += step.seconds;
            show(&bar, &step);
            write_line(&mut metrics, &step)?;
            if save && step.step < trainer.total_steps() {
                self.save(trainer, saved)?;
                saved = true;
            }
        }
        bar.finish_and_clear();
        if held_out
            .last()
            .is_none_or(|(step, _)| *step < as_f64(trainer.steps_taken()))
        {
            self.evaluate(trainer, &mut held_out)?;
        }
        self.save(trainer, saved)?;
        let taken = as_f64(training.len() as u64).max(1.0);
        let summary = Summary {
            retrieval_before,
            retrieval_after: self.retrieval(trainer)?,
            ..self.summary(trainer, check, seconds / taken, &training, &held_out)?
        };
        write_line(&mut metrics, &SummaryLine { summary: &summary })?;
        Ok(RunReport {
            summary,
            training,
            held_out,
        })
    }

    /// The held-out loss now, remembered.
    fn evaluate(&self, trainer: &Trainer, held_out: &mut Vec<(f64, f64)>) -> Result<Option<f64>> {
        let Some(data) = &self.eval_data else {
            return Ok(None);
        };
        let loss = trainer.evaluate(data)?.loss;
        held_out.push((as_f64(trainer.steps_taken()), loss));
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
        let builder = match (self.lora, trainer.model().as_decoder()) {
            (Some(lora), Some(decoder)) => {
                let config = lora.config(decoder.config())?;
                trainer.model().add_low_rank(builder.lora(config))?
            }
            _ => builder.target_modules(self.target_modules.to_vec()),
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
        training: &[(f64, f64)],
        held_out: &[(f64, f64)],
    ) -> Result<Summary> {
        let table = self.model.table()?;
        let rows = trainer.model().embedding().tokens().len();
        let lora = trainer.model().low_rank();
        let (loss_of, losses) = if held_out.is_empty() {
            ("first and last training batch", training)
        } else {
            ("held-out data", held_out)
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
            objective: trainer.objective().name(),
            retrieval_before: None,
            retrieval_after: None,
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
fn as_f64(count: u64) -> f64 {
    count as f64
}

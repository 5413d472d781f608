//! What is measured on the way of a run, and told of it in the end.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use trainable_tokens_core::{EmbeddingSource as _, TokenRows, TokenSet};
use trainable_tokens_format::{Overwrite, write_file_atomically};
use trainable_tokens_trainer::{StepMetrics, Trainer};

use super::dead::dead_tokens;
use super::metrics::Metrics;
use super::run::Run;
use crate::history::{History, StepLine};
use crate::report::page;
use crate::rows::{RowReport, norms_and_drifts, row_reports, token_name};
use crate::summary::Summary;

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
    /// The rows that the run started from; of a resumed run those of the first.
    pub(super) fn start(&self, trainer: &Trainer) -> Result<TokenRows> {
        let table = self.model.table()?;
        let tokens = TokenSet::new(trainer.model().embedding().tokens().to_vec(), table.vocab_size())?;
        self.initial.rows(&table, &tokens)
    }

    /// Writes down what a step did, and where the rows are after it.
    pub(super) fn measure(
        &self,
        trainer: &Trainer,
        start: &TokenRows,
        step: &StepMetrics,
        metrics: &mut Metrics,
        history: &mut History,
    ) -> Result<()> {
        let watched = self.outputs.metrics.is_some() || self.outputs.report.is_some();
        let (row_norms, row_drifts) = if watched && start.num_rows() <= MOST_MEASURED {
            norms_and_drifts(start, &trainer.model().embedding().rows()?)
        } else {
            (Vec::new(), Vec::new())
        };
        metrics.write(&MetricsLine {
            step,
            row_norms: &row_norms,
            row_drifts: &row_drifts,
        })?;
        history.steps.push(StepLine {
            step: step.step,
            loss: step.loss,
            lr: step.lr,
            grad_norm: step.grad_norm,
            eval_loss: step.eval_loss,
            row_norms,
            row_drifts,
        });
        Ok(())
    }

    /// Adds what became of each row to the summary, and writes it down.
    pub(super) fn close(
        &self,
        trainer: &Trainer,
        start: &TokenRows,
        summary: &mut Summary,
        metrics: &mut Metrics,
        history: &mut History,
    ) -> Result<()> {
        summary.dead_tokens = dead_tokens(trainer, &self.model.vocabulary)?;
        summary.tokens = self.row_reports(trainer, start)?;
        let tokens = summary.tokens.iter();
        let names = tokens.map(|row| token_name(row.token_id, row.token.as_deref()));
        history.tokens = names.collect();
        metrics.write(&SummaryLine { summary })?;
        match self.outputs.report {
            None => Ok(()),
            Some(path) => self.write_report(path, summary, history),
        }
    }

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

    fn write_report(&self, path: &Path, summary: &Summary, history: &History) -> Result<()> {
        let options: toml::Table = self.outputs.config.parse()?;
        let text = |value: toml::Value| match value {
            toml::Value::String(text) => text,
            toml::Value::Array(items) => {
                let items = items
                    .iter()
                    .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
                items.collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        let options: Vec<_> = options
            .into_iter()
            .map(|(name, value)| (name, text(value)))
            .collect();
        let page = page(summary, history, &options)?;
        write_file_atomically(path, Overwrite::Replace, |file| -> Result<()> {
            file.write_all(page.as_bytes())
                .with_context(|| format!("cannot write {}", path.display()))
        })
    }
}

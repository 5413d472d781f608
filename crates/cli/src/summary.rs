//! The table that training ends with.

use std::path::PathBuf;

use serde::Serialize;
use trainable_tokens_trainer::Retrieval;

use crate::commands::train::DeadToken;
use crate::output::bytes;
use crate::rows::{RowReport, rows_table};

/// Why a run took no further step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    #[default]
    LastStep,
    EarlyStopping,
    Interrupted,
}

/// What a training run cost and did.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    pub(crate) adapter: PathBuf,
    /// How the rows started, as it is recorded in the adapter.
    pub(crate) init: String,
    pub(crate) steps: u64,
    pub(crate) end: End,
    /// The steps after which the rows were what the adapter holds.
    pub(crate) kept_step: u64,
    /// The evaluation with the lowest loss.
    pub(crate) best_step: Option<u64>,
    pub(crate) best_eval_loss: Option<f64>,
    pub(crate) rows_trained: usize,
    /// Linear layers with weights of LoRA.
    pub(crate) lora_modules: usize,
    pub(crate) vocab_size: usize,
    pub(crate) parameters_trained: usize,
    pub(crate) parameters_total: usize,
    pub(crate) adapter_bytes: u64,
    pub(crate) table_bytes: u64,
    /// What the two losses are of: held-out data, or the first and last batch.
    pub(crate) loss_of: &'static str,
    pub(crate) loss_before: f64,
    pub(crate) loss_after: f64,
    pub(crate) largest_untouched_change: f64,
    pub(crate) seconds_per_step: f64,
    pub(crate) peak_rss_bytes: Option<u64>,
    /// Relative error of the gradient against finite differences, before training.
    pub(crate) gradient_check_error: f64,
    /// How much of it rounding and curvature can explain; above 0.1 the check cannot tell.
    pub(crate) gradient_check_uncertainty: f64,
    /// Where each row came from and went to, in slot order.
    pub(crate) tokens: Vec<RowReport>,
    /// Tokens whose rows no step has reached.
    pub(crate) dead_tokens: Vec<DeadToken>,
    /// What was minimised.
    pub(crate) objective: &'static str,
    /// How well sentences found their definitions, where those were taught.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) retrieval_before: Option<Retrieval>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) retrieval_after: Option<Retrieval>,
}

/// A line about how well sentences find their definitions.
pub(crate) fn retrieval_text(retrieval: Retrieval) -> String {
    format!(
        "recall@1 {:.3}, MRR {:.3}, cosine {:.3} of {} sentences among {} definitions",
        retrieval.recall_at_1, retrieval.mrr, retrieval.cosine, retrieval.sentences, retrieval.definitions
    )
}

impl Summary {
    /// The table, and those of the rows.
    pub(crate) fn to_text(&self) -> String {
        self.to_text_with([])
    }

    /// With more lines after its own.
    pub(crate) fn to_text_with<const N: usize>(&self, more: [(&'static str, String); N]) -> String {
        let mut text = String::new();
        for (name, value) in self.lines().into_iter().chain(more) {
            text += &format!("{name:<25} {value}\n");
        }
        for dead in &self.dead_tokens {
            text += &format!("{:<25} {}: {}\n", "row not reached", dead.name(), dead.reason);
        }
        if self.tokens.is_empty() {
            return text;
        }
        text + "\n" + &rows_table(&self.tokens)
    }

    /// The table by its lines.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let share = 100.0 * self.parameters_trained as f64 / self.parameters_total.max(1) as f64;
        let peak = self.peak_rss_bytes.map_or_else(|| "unknown".to_owned(), bytes);
        let rows = [
            (
                "rows trained",
                format!("{} of {}", self.rows_trained, self.vocab_size),
            ),
            (
                "parameters trained",
                format!(
                    "{} of {} ({share:.2}%)",
                    self.parameters_trained, self.parameters_total
                ),
            ),
            (
                "adapter size",
                format!(
                    "{} (the table: {})",
                    bytes(self.adapter_bytes),
                    bytes(self.table_bytes)
                ),
            ),
            (
                "loss before and after",
                format!(
                    "{:.4} -> {:.4} ({})",
                    self.loss_before, self.loss_after, self.loss_of
                ),
            ),
            (
                "change of untouched rows",
                format!("{}", self.largest_untouched_change),
            ),
            ("gradient check", self.gradient_check()),
            (
                "time per step",
                format!("{:.4} s, {} steps", self.seconds_per_step, self.steps),
            ),
            ("peak memory", peak),
            ("adapter", self.adapter.display().to_string()),
        ];
        let end = match self.end {
            End::LastStep => None,
            End::EarlyStopping => Some(("ended", format!("early, after step {}", self.steps))),
            End::Interrupted => Some(("ended", format!("interrupted, after step {}", self.steps))),
        };
        let kept = (self.kept_step < self.steps).then(|| {
            let loss = self.best_eval_loss.unwrap_or(f64::NAN);
            (
                "adapter kept",
                format!("of step {}, held-out loss {loss:.4}", self.kept_step),
            )
        });
        let started = (self.init != "keep").then(|| ("rows started as", self.init.clone()));
        let lora = (self.lora_modules > 0).then(|| ("layers with LoRA", self.lora_modules.to_string()));
        let retrieval = [
            ("retrieval before", self.retrieval_before),
            ("retrieval after", self.retrieval_after),
        ];
        let retrieval = retrieval
            .into_iter()
            .filter_map(|(name, found)| Some((name, retrieval_text(found?))));
        let rows = started.into_iter().chain(lora).chain(retrieval).chain(rows);
        rows.chain(end).chain(kept).collect()
    }

    fn gradient_check(&self) -> String {
        let error = format!("relative error {:.1e}", self.gradient_check_error);
        if self.gradient_check_uncertainty > 0.1 {
            return format!("{error}, inconclusive: the loss is rounded too coarsely to tell");
        }
        error
    }
}

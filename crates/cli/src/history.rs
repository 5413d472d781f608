//! The course of a run, as its metrics file tells it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::plot::{Chart, Series};
use crate::rows::token_name;

/// Rows that charts have a line for.
const MOST_LINES: usize = 10;

/// What a run did, step by step.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) steps: Vec<StepLine>,
    /// (step, loss) of every evaluation.
    pub(crate) held_out: Vec<(f64, f64)>,
    /// The trained tokens, in slot order, where they are known.
    pub(crate) tokens: Vec<String>,
}

/// One line of a metrics file.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct StepLine {
    pub(crate) step: u64,
    pub(crate) loss: f64,
    pub(crate) lr: f64,
    pub(crate) grad_norm: f64,
    #[serde(default)]
    pub(crate) eval_loss: Option<f64>,
    #[serde(default)]
    pub(crate) row_norms: Vec<f64>,
    #[serde(default)]
    pub(crate) row_drifts: Vec<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Step(StepLine),
    Summary { summary: SummaryLine },
}

/// What a chart needs of the closing line.
#[derive(Deserialize)]
struct SummaryLine {
    steps: u64,
    loss_of: String,
    loss_before: Option<f64>,
    loss_after: Option<f64>,
    #[serde(default)]
    tokens: Vec<TokenLine>,
}

#[derive(Deserialize)]
struct TokenLine {
    token_id: u32,
    token: Option<String>,
}

/// What `loss_of` says where the losses are of held-out data.
pub(crate) const HELD_OUT: &str = "held-out data";

impl History {
    /// Reads a metrics file; of a run that was interrupted too.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut history = Self::default();
        for (number, line) in (1..)
            .zip(text.lines())
            .filter(|(_, line)| !line.trim().is_empty())
        {
            match serde_json::from_str(line) {
                Ok(Line::Step(step)) => history.add(step),
                Ok(Line::Summary { summary }) => history.close(&summary),
                Err(_) => bail!(
                    "{}, line {number}: is neither a step nor the summary of a metrics file",
                    path.display()
                ),
            }
        }
        if history.steps.is_empty() {
            bail!("{} holds no step", path.display());
        }
        history.held_out.sort_by(|a, b| a.0.total_cmp(&b.0));
        history.held_out.dedup_by_key(|(step, _)| *step);
        Ok(history)
    }

    fn add(&mut self, step: StepLine) {
        // A resumed run takes up again at a step that the interrupted one had passed.
        self.steps.retain(|other| other.step < step.step);
        let at = as_f64(step.step);
        self.held_out.retain(|(other, _)| *other < at);
        self.held_out.extend(step.eval_loss.map(|loss| (at, loss)));
        self.steps.push(step);
    }

    fn close(&mut self, summary: &SummaryLine) {
        self.tokens = summary
            .tokens
            .iter()
            .map(|token| token_name(token.token_id, token.token.as_deref()))
            .collect();
        if summary.loss_of == HELD_OUT {
            let before = summary.loss_before.map(|loss| (0.0, loss));
            let after = summary.loss_after.map(|loss| (as_f64(summary.steps), loss));
            self.held_out.extend(before);
            self.held_out.extend(after);
        }
    }

    /// (step, loss) of every training batch.
    pub(crate) fn training(&self) -> Vec<(f64, f64)> {
        self.of(|step| step.loss)
    }

    fn of(&self, value: impl Fn(&StepLine) -> f64) -> Vec<(f64, f64)> {
        self.steps
            .iter()
            .map(|step| (as_f64(step.step), value(step)))
            .collect()
    }

    /// The charts of what is there.
    pub(crate) fn charts(&self) -> Vec<Chart> {
        let mut loss = vec![Series::line("training batch", self.training())];
        if !self.held_out.is_empty() {
            loss.push(Series::marked("held-out data", self.held_out.clone()));
        }
        let mut charts = vec![
            Chart::new("loss", "cross-entropy (nats)", loss),
            Chart::new(
                "gradient norm",
                "L2 norm, before clipping",
                vec![Series::line("gradient norm", self.of(|step| step.grad_norm))],
            ),
            Chart::new(
                "learning rate",
                "learning rate",
                vec![Series::line("learning rate", self.of(|step| step.lr))],
            ),
        ];
        let norms = self.rows(|step| &step.row_norms);
        let drifts = self.rows(|step| &step.row_drifts);
        if !norms.is_empty() {
            charts.push(Chart::new("row norms", "L2 norm", norms));
        }
        if !drifts.is_empty() {
            charts.push(Chart::new("row drift", "L2 distance from the start", drifts));
        }
        charts
    }

    /// A line for each of the first rows.
    fn rows(&self, values: impl Fn(&StepLine) -> &Vec<f64>) -> Vec<Series> {
        let count = self
            .steps
            .iter()
            .map(|step| values(step).len())
            .max()
            .unwrap_or(0);
        let series = (0..count.min(MOST_LINES)).map(|slot| {
            let points = self
                .steps
                .iter()
                .filter_map(|step| Some((as_f64(step.step), *values(step).get(slot)?)));
            let name = self.tokens.get(slot).cloned();
            Series::line(&name.unwrap_or_else(|| format!("row {slot}")), points.collect())
        });
        series.collect()
    }
}

pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}

//! The training loop.

use std::path::Path;
use std::time::Instant;

use candle_core::DType;
use candle_core::backprop::GradStore;
use serde::{Deserialize, Serialize};
use trainable_tokens_core::{ClipGradNorm, EmbeddingSource, PaddingRule, Slot, TokenId, TokenRows};
use trainable_tokens_format::{Adapter, Checkpoint, TrainingState};

use crate::loss::scalar;
use crate::objective::Task;
use crate::part::{self, Part};
use crate::probe::{SHORTEST_FACTOR, SHORTEST_ROW};
use crate::{
    Batch, Dataset, Error, Evaluation, GradientCheck, Graph, LanguageModel, Objective, OptimizerKind, Result,
    Sampler, TrainOptions, check_gradient, evaluate, peak_rss_bytes,
};

/// What one step did, as it is written to a metrics file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean loss of the batch before the update; that of tokens is a cross-entropy, in nats.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// L2 norm of the gradient of all rows, before clipping.
    pub grad_norm: f64,
    /// Tokens of the batch, without padding.
    pub tokens: u64,
    /// Wall-clock time of the step.
    pub seconds: f64,
    /// Largest resident set of the process so far.
    pub peak_rss_bytes: Option<u64>,
    /// Loss over the evaluation data, where it was due after this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}

/// What a run must share with the one it continues; kept in the training state.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct RunIdentity {
    optimizer: OptimizerKind,
    token_indices: Vec<u32>,
    num_examples: usize,
    batch_size: usize,
    seed: u64,
    shuffle: bool,
    /// What trains beside the rows of these tokens.
    #[serde(default)]
    others: Vec<String>,
    #[serde(default = "causal")]
    objective: String,
}

/// The only objective that there was before its name was saved.
fn causal() -> String {
    Objective::Causal.to_string()
}

/// Trains the rows of a model, and its weights of LoRA where it has some, on a [`Dataset`].
pub struct Trainer {
    model: LanguageModel,
    data: Dataset,
    task: Task,
    options: TrainOptions,
    sampler: Sampler,
    parts: Vec<Part>,
    clip: Option<ClipGradNorm>,
    step: u64,
    total_steps: u64,
}

impl Trainer {
    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] and core's error for a hyper-parameter out of its range; [`Error::Setting`] if no token
    /// trains, and if the objective is not for the model; [`Error::Data`] if it is not for the data.
    pub fn new(model: impl Into<LanguageModel>, data: Dataset, options: TrainOptions) -> Result<Self> {
        options.check()?;
        let model = model.into();
        let parts = part::parts(&model, &options)?;
        if parts.is_empty() {
            return Err(Error::Setting("no token trains: name at least one".to_owned()));
        }
        let objective = options.objective.clone();
        let objective = objective.unwrap_or_else(|| Objective::of_model(&model));
        let task = Task::new(objective, &model, &data)?;
        let shuffle = options.shuffle.then_some(options.seed);
        let sampler = Sampler::new(
            data.examples().len(),
            options.batch_size,
            shuffle,
            options.steps.is_some(),
        );
        let total_steps = options.steps.unwrap_or_else(|| sampler.steps_per_epoch());
        let clip = options.build_clip()?;
        Ok(Self {
            model: model.with_recomputation(options.recompute),
            data,
            task,
            options,
            sampler,
            parts,
            clip,
            step: 0,
            total_steps,
        })
    }

    /// The model, its rows as they are now.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// Steps taken, those of a resumed run included.
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Compares the gradient of the first example with finite differences of its loss, once for the rows and once for
    /// LoRA's factors; all values are as before afterwards. The row of a padding token that gets no gradient from the lookup
    /// is left out: that gradient is not the slope of the loss, by choice. Returns the worse of the two.
    ///
    /// # Errors
    ///
    /// [`Error::GradientMismatch`], core's [`NoGradient`](trainable_tokens_core::Error::NoGradient) if nothing
    /// reaches the rows; candle's errors.
    pub fn check_gradient(&mut self) -> Result<GradientCheck> {
        let batch = self.probe_batch()?;
        let gradients = self.task.loss(&self.model, &batch, Graph::Keep)?.backward()?;
        let mut worst = GradientCheck::default();
        for factors in [false, true] {
            let parts = 0..self.parts.len();
            let chosen: Vec<usize> = parts
                .filter(|at| self.parts[*at].matrix().is_factor() == factors)
                .collect();
            let shortest = if factors { SHORTEST_FACTOR } else { SHORTEST_ROW };
            let check = self.check_parts(&chosen, shortest, &gradients, &batch)?;
            if check.relative_error > worst.relative_error {
                worst = check;
            }
        }
        Ok(worst)
    }

    fn check_parts(
        &mut self,
        chosen: &[usize],
        shortest: f64,
        gradients: &GradStore,
        batch: &Batch,
    ) -> Result<GradientCheck> {
        let precision = match self.model.embedding().table().tensor().dtype() {
            DType::F64 => f64::EPSILON,
            DType::F16 => half::f16::EPSILON.to_f64(),
            DType::BF16 => half::bf16::EPSILON.to_f64(),
            _ => f64::from(f32::EPSILON),
        };
        let held = self.row_without_lookup_gradient();
        let held_of = |part: &Part| held.filter(|_| part.matrix().is_embedding());
        let (mut start, mut slopes) = (Vec::new(), Vec::new());
        for part in chosen.iter().map(|at| &self.parts[*at]) {
            let (values, slope) = (part.read()?, part.gradient(gradients)?);
            let nothing = TokenRows::zeros(slope.dtype(), values.num_rows(), values.embedding_dim());
            slopes.push(with_row(&slope, held_of(part), &nothing)?);
            start.push(values);
        }
        let (model, task, parts) = (&self.model, &self.task, &mut self.parts);
        // A loss is a mean of many rounded terms: a few units in the last place.
        let outcome = check_gradient(
            &start,
            &slopes,
            shortest,
            self.options.seed,
            4.0 * precision,
            |nudged| {
                for ((at, nudged), start) in chosen.iter().zip(nudged).zip(&start) {
                    let part = &mut parts[*at];
                    part.write(&with_row(nudged, held_of(part), start)?)?;
                }
                Ok(scalar(&task.loss(model, batch, Graph::Drop)?)?)
            },
        );
        for (at, start) in chosen.iter().zip(&start) {
            parts[*at].write(start)?;
        }
        outcome
    }

    /// The slot of the padding token, if it trains and the lookup gives it no gradient.
    fn row_without_lookup_gradient(&self) -> Option<Slot> {
        let layer = self.model.embedding().layer();
        let padding = layer.options().padding?;
        let held = padding.rule == PaddingRule::NoLookupGradient;
        held.then(|| layer.tokens().slot(padding.token)).flatten()
    }

    /// The first example of the run that meets a trainable token, or else simply the first: in a tied model, or
    /// with no trainable token in sight, it still says whether the graph is whole.
    fn probe_batch(&self) -> Result<Batch> {
        let tokens = self.model.embedding().tokens();
        let batch = |index| {
            let indices = self.task.probe(&self.data, index);
            self.task.batch(&self.model, &self.data, &indices, 0)
        };
        // The last token of an example predicts nothing in a causal model.
        let unseen = usize::from(*self.task.objective() == Objective::Causal);
        let found = (0..self.data.examples().len()).find_map(|index| {
            let batch = batch(index).ok()?;
            let seen = &batch.input_ids()[..batch.length() - unseen];
            seen.iter()
                .any(|id| tokens.contains(TokenId(*id)))
                .then_some(batch)
        });
        found.map_or_else(|| batch(0), Ok)
    }

    /// Takes one step.
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`] if the loss is not finite (the rows are as before then); [`Error::Dataset`] if the batch
    /// has no target; those of the model, the hooks and the optimizer.
    pub fn step(&mut self) -> Result<StepMetrics> {
        let started = Instant::now();
        let indices = self.sampler.indices(self.step);
        let first = self.step.saturating_mul(self.options.batch_size as u64);
        let batch = self.task.batch(&self.model, &self.data, &indices, first)?;
        let loss = self.task.loss(&self.model, &batch, Graph::Keep)?;
        let value = scalar(&loss)?;
        if !value.is_finite() {
            return Err(Error::Diverged {
                step: self.step + 1,
                loss: value,
                lines: self.data.lines_of(&indices),
            });
        }
        let gradients = loss.backward()?;
        let factor = self
            .options
            .schedule
            .factor(self.step, self.options.warmup_steps, self.total_steps);
        let lr = self.options.lr * factor;
        let grad_norm = part::step(&mut self.parts, &gradients, self.clip.as_ref(), lr)?;
        self.step += 1;
        Ok(StepMetrics {
            step: self.step,
            loss: value,
            lr,
            grad_norm,
            tokens: batch.num_tokens() as u64,
            seconds: started.elapsed().as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
            eval_loss: None,
        })
    }

    /// What is minimised.
    pub fn objective(&self) -> &Objective {
        self.task.objective()
    }

    /// The data that it trains on.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The loss over other data.
    ///
    /// # Errors
    ///
    /// Those of [`evaluate`].
    pub fn evaluate(&self, data: &Dataset) -> Result<Evaluation> {
        evaluate(&self.model, data, self.task.objective(), self.options.batch_size)
    }

    /// All that is needed, besides the rows, to continue the run.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the state cannot be written as JSON.
    pub fn training_state(&self) -> Result<TrainingState> {
        let extra =
            serde_json::to_value(self.identity()).map_err(|error| Error::Setting(error.to_string()))?;
        Ok(TrainingState {
            optimizer: part::state(&self.parts),
            extra,
        })
    }

    /// Continues a run from what it saved, its adapter and its state: the next step is the one that the run would have
    /// taken.
    ///
    /// # Errors
    ///
    /// [`Error::Resume`] if the state belongs to a run with another optimizer, objective, other tokens, data, batch size,
    /// seed or order, or if other matrices train; [`Error::Setting`] if the adapter lacks one of them; core's errors if tensors
    /// do not fit.
    pub fn resume(&mut self, adapter: &Adapter, state: TrainingState, path: &Path) -> Result<()> {
        let refuse = |reason: String| Error::Resume {
            path: path.to_owned(),
            reason,
        };
        let saved: RunIdentity = serde_json::from_value(state.extra)
            .map_err(|error| refuse(format!("is not the state of a training run: {error}")))?;
        let current = self.identity();
        if saved != current {
            return Err(refuse(format!(
                "is the state of another run: {}",
                saved.difference(&current)
            )));
        }
        let step = state.optimizer.step;
        if step > self.total_steps {
            return Err(refuse(format!(
                "has taken {step} steps already, of the {} asked for",
                self.total_steps
            )));
        }
        part::load(&mut self.parts, state.optimizer, adapter)?;
        self.step = step;
        Ok(())
    }

    fn identity(&self) -> RunIdentity {
        RunIdentity {
            optimizer: self.options.optimizer,
            token_indices: self.model.embedding().tokens().to_vec(),
            num_examples: self.data.examples().len(),
            batch_size: self.options.batch_size,
            seed: self.options.seed,
            shuffle: self.options.shuffle,
            others: self.others(),
            objective: self.task.objective().to_string(),
        }
    }

    /// What trains beside the rows of the input embedding.
    fn others(&self) -> Vec<String> {
        let others = self.parts.iter().filter(|part| !part.matrix().is_embedding());
        others.map(Part::describe).collect()
    }

    /// The largest absolute difference between any row of the frozen table and the checkpoint it was loaded from.
    /// Training never writes the table, so this is 0; it is compared, not assumed.
    ///
    /// # Errors
    ///
    /// Those of reading either table.
    pub fn largest_base_change(&self, checkpoint: &Checkpoint) -> Result<f64> {
        const ROWS_AT_A_TIME: u32 = 4096;
        let (table, origin) = (
            self.model.embedding().table(),
            checkpoint.table(&format!("{}.weight", self.model.embedding_module()))?,
        );
        let vocab_size = u32::try_from(table.vocab_size()).unwrap_or(u32::MAX);
        let mut largest: f64 = 0.0;
        let mut start = 0;
        while start < vocab_size {
            let end = vocab_size.min(start + ROWS_AT_A_TIME);
            let ids: Vec<TokenId> = (start..end).map(TokenId).collect();
            let (now, before) = (
                table.read_rows(&ids)?,
                origin.read_rows(&ids)?.to_dtype(table.dtype()),
            );
            if !now.bits_eq(&before) {
                let difference = |(now, before): (f64, f64)| {
                    if now.to_bits() == before.to_bits() {
                        0.0
                    } else {
                        (now - before).abs()
                    }
                };
                let differences = now
                    .to_f64_vec()
                    .into_iter()
                    .zip(before.to_f64_vec())
                    .map(difference);
                largest = differences.fold(largest, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
            }
            start = end;
        }
        Ok(largest)
    }
}

/// `rows` with the row at `slot` taken from `source`.
fn with_row(rows: &TokenRows, slot: Option<Slot>, source: &TokenRows) -> Result<TokenRows> {
    let Some(Slot(slot)) = slot else {
        return Ok(rows.clone());
    };
    let [k, dim] = rows.shape();
    let (mut values, range) = (rows.to_f64_vec(), slot * dim..(slot + 1) * dim);
    values[range.clone()].copy_from_slice(&source.to_f64_vec()[range]);
    Ok(TokenRows::new::<f64>(values, k, dim)?.to_dtype(rows.dtype()))
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
            ("seed", self.seed.to_string(), current.seed.to_string()),
            ("shuffle", self.shuffle.to_string(), current.shuffle.to_string()),
            (
                "list of other trained weights",
                format!("{:?}", self.others),
                format!("{:?}", current.others),
            ),
            ("objective", self.objective.clone(), current.objective.clone()),
        ];
        let differs = pairs.into_iter().find(|(_, saved, current)| saved != current);
        differs.map_or_else(String::new, |(name, saved, current)| {
            format!("its {name} is {saved}, not {current}")
        })
    }
}

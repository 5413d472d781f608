//! The training loop.

mod best;

use std::path::Path;
use std::time::Instant;

use candle_core::DType;
use candle_core::backprop::GradStore;
use serde::{Deserialize, Serialize};
use trainable_tokens_core::{
    ClipGradNorm, EmbeddingSource, PaddingRule, Slot, TokenId, TokenRows, joint_norm,
};
use trainable_tokens_format::{Adapter, Checkpoint, TrainingState};

use crate::accumulate::Accumulated;
use crate::activity::{Activity, TokenActivity};
use crate::early_stopping::Evaluations;
use crate::loss::scalar;
use crate::objective::Task;
use crate::part::{self, Part};
use crate::probe::{SHORTEST_FACTOR, SHORTEST_ROW};
use crate::{
    Batch, Dataset, Error, Evaluation, GradientCheck, Graph, LanguageModel, Objective, OptimizerKind, Result,
    Sampler, TrainOptions, check_gradient, evaluate, peak_rss_bytes,
};

/// Tokens of the example that the gradient is checked on: each of many losses costs by them, and by the vocabulary.
const PROBE_LENGTH: usize = 64;

/// What one step did, as it is written to a metrics file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean loss of the step before the update; that of tokens is the cross-entropy of all its targets, in nats.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// L2 norm of the gradient of all rows, before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, without padding.
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
}

fn one() -> usize {
    1
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
    activity: Activity,
    step: u64,
    total_steps: u64,
    evaluations: Evaluations,
    /// The values of all parts at the best evaluation.
    best: Option<Vec<TokenRows>>,
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
            options.batch_size * options.accumulate,
            shuffle,
            options.steps.is_some(),
        );
        let total_steps = options.steps.unwrap_or_else(|| sampler.steps_per_epoch());
        let clip = options.build_clip()?;
        let frozen = |id: TokenId| {
            options
                .token_lr
                .iter()
                .any(|(other, lr)| *other == id.0 && *lr == 0.0)
        };
        let activity = Activity::new(model.embedding().tokens().clone(), frozen);
        Ok(Self {
            activity,
            model: model.with_recomputation(options.recompute),
            data,
            task,
            options,
            sampler,
            parts,
            clip,
            step: 0,
            total_steps,
            evaluations: Evaluations::default(),
            best: None,
        })
    }

    /// The model, its rows as they are now.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// What it trains on.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// Steps taken, those of a resumed run included.
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// What the steps have done to each row of the input embedding, in slot order.
    pub fn activity(&self) -> &[TokenActivity] {
        self.activity.counts()
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
    /// with no trainable token in sight, it still says whether the graph is whole. Of a long one, a part around that token.
    fn probe_batch(&self) -> Result<Batch> {
        let tokens = self.model.embedding().tokens();
        let is_trained = |id: &u32| tokens.contains(TokenId(*id));
        // The last token of an example predicts nothing in a causal model.
        let unseen = usize::from(*self.task.objective() == Objective::Causal);
        let meets = |index: usize| {
            let example = self.data.examples().get(index)?;
            example.input_ids.iter().find(|id| is_trained(id))?;
            let batch = self.task.probe(&self.model, &self.data, index).ok()?;
            let seen = &batch.input_ids()[..batch.length() - unseen];
            let at = seen.iter().position(is_trained)?;
            Some((batch, at))
        };
        let found = (0..self.data.examples().len()).find_map(meets);
        let first = || Ok((self.task.probe(&self.model, &self.data, 0)?, 0));
        let (batch, at) = found.map_or_else(first, Ok::<_, Error>)?;
        Ok(self.task.window(&batch, at, PROBE_LENGTH).unwrap_or(batch))
    }

    /// Takes one step.
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`] and [`Error::DivergedGradient`] if the loss or its gradient is not finite (the rows are as before then); [`Error::Dataset`]
    /// if no batch of the step has a target; those of the model, the hooks and the optimizer.
    pub fn step(&mut self) -> Result<StepMetrics> {
        let started = Instant::now();
        let (sum, tokens) = self.accumulate()?;
        let (loss, gradients) = (sum.loss(), sum.into_gradients()?);
        let is_rows = |part: &Part| part.matrix().is_embedding();
        if let Some(at) = self.parts.iter().position(is_rows) {
            self.activity.end_step(&gradients[at]);
        }
        let TrainOptions {
            schedule,
            warmup_steps,
            min_lr_ratio,
            ..
        } = self.options;
        let factor = schedule.factor(self.step, warmup_steps, self.total_steps, min_lr_ratio);
        let lr = self.options.lr * factor;
        let grad_norm = part::step(&mut self.parts, gradients, self.clip.as_ref(), factor)?;
        self.step += 1;
        Ok(StepMetrics {
            step: self.step,
            loss,
            lr,
            grad_norm,
            tokens,
            seconds: started.elapsed().as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
            eval_loss: None,
        })
    }

    /// What is minimised.
    pub fn objective(&self) -> &Objective {
        self.task.objective()
    }

    /// Loss and gradient over all batches of the step, and their tokens.
    fn accumulate(&mut self) -> Result<(Accumulated, u64)> {
        let batches = self.batches()?;
        let all = batches.iter().map(|(_, batch)| batch.num_terms()).sum();
        let (mut sum, mut tokens) = (Accumulated::over(all), 0);
        for (indices, batch) in batches {
            let loss = self.task.loss(&self.model, &batch, Graph::Keep)?;
            let value = scalar(&loss)?;
            let (step, lines) = (self.step + 1, || self.data.lines_of(&indices));
            if !value.is_finite() {
                let lines = lines();
                return Err(Error::Diverged {
                    step,
                    loss: value,
                    lines,
                });
            }
            let gradients = part::gradients(&self.parts, &loss.backward()?)?;
            if !joint_norm(&gradients).is_finite() {
                let lines = lines();
                return Err(Error::DivergedGradient {
                    step,
                    loss: value,
                    lines,
                });
            }
            let examples = indices
                .iter()
                .filter_map(|index| self.data.examples().get(*index));
            examples.for_each(|example| self.activity.see(example));
            sum.add(value, gradients, batch.num_terms());
            tokens += batch.num_tokens() as u64;
        }
        Ok((sum, tokens))
    }

    /// The batches of the next step and the examples of each. One without a target adds nothing, unless all are.
    fn batches(&mut self) -> Result<Vec<(Vec<usize>, Batch)>> {
        let (mut found, mut last_error) = (Vec::new(), None);
        let size = self.options.batch_size;
        let per_step = (size * self.options.accumulate) as u64;
        let mut first = self.step.saturating_mul(per_step);
        for indices in self.sampler.indices(self.step).chunks(size) {
            match self.task.batch(&self.model, &self.data, indices, first) {
                Ok(batch) => found.push((indices.to_vec(), batch)),
                Err(error) => last_error = Some(error),
            }
            first = first.saturating_add(size as u64);
        }
        match last_error.filter(|_| found.is_empty()) {
            None => Ok(found),
            Some(error) => Err(error),
        }
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
        let saved = Saved {
            run: self.identity(),
            evaluations: self.evaluations,
            values: Some(part::digest(&self.parts, &self.values()?)),
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
        } = serde_json::from_value(state.extra)
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
        let found = part::digest(&self.parts, &part::values(&self.parts, adapter)?);
        if values.is_some_and(|values| values != found) {
            return Err(refuse(format!(
                "is not the state of the adapter beside it, but of other values, after step {step}"
            )));
        }
        part::load(&mut self.parts, state.optimizer, adapter)?;
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

    /// The largest absolute difference between any row of the frozen table and the checkpoint it was loaded from.
    /// Training never writes the table, so this is 0; it is compared, not assumed.
    ///
    /// # Errors
    ///
    /// Those of reading either table.
    pub fn largest_base_change(&self, checkpoint: &Checkpoint) -> Result<f64> {
        const ROWS_AT_A_TIME: u32 = 4096;
        let module = self.model.embedding_module();
        let (table, origin) = (
            self.model.embedding().table(),
            checkpoint.table(&format!("{}.weight", checkpoint.module_name(&module)))?,
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

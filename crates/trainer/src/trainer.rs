//! The training loop.

mod base;
mod best;
mod check;
mod state;

use std::time::Instant;

use serde::Serialize;
use trainable_tokens_core::{ClipGradNorm, TokenId, TokenRows, joint_norm};

use crate::accumulate::Accumulated;
use crate::activity::{Activity, TokenActivity};
use crate::early_stopping::Evaluations;
use crate::loss::scalar;
use crate::objective::Task;
use crate::part::{self, Part};
use crate::{
    Batch, Dataset, Error, Evaluation, Graph, LanguageModel, Objective, Result, Sampler, TrainOptions,
    evaluate, peak_rss_bytes,
};

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
}

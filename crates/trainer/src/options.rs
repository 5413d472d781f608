//! The settings of a training run.

use serde::{Deserialize, Serialize};
use trainable_tokens_core::{
    Adam, AdamConfig, ClipGradNorm, Decay, DecayTowardOriginal, RowOptimizer, Sgd, SgdConfig, TokenRows,
};

use crate::{EarlyStopping, Error, Result, Schedule};

/// The update rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Adam; weight decay enters the gradient.
    Adam,
    /// Gradient descent with momentum; weight decay enters the gradient.
    Sgd,
}

/// Where weight decay pulls rows to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecayToward {
    /// Zero, as in torch.
    #[default]
    Zero,
    /// The values that training started from; decoupled from the gradient in every optimizer.
    Original,
}

/// Which norm rows are scaled to after each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormTarget {
    /// The mean norm of all rows of the table.
    Mean,
    /// The norm that the row started with.
    Original,
}

/// The settings of a training run. Names and defaults are torch's where torch has them; weight decay is 0.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Steps to take; one pass over the data if absent.
    pub steps: Option<u64>,
    /// Examples at a time.
    pub batch_size: usize,
    /// Batches per step: their gradients add up to that of the mean over all targets of the step.
    pub accumulate: usize,
    /// The update rule.
    pub optimizer: OptimizerKind,
    /// Learning rate.
    pub lr: f64,
    /// Adam's decay of the first moment.
    pub beta1: f64,
    /// Adam's decay of the second moment.
    pub beta2: f64,
    /// Adam's summand in the denominator.
    pub eps: f64,
    /// Strength of weight decay.
    pub weight_decay: f64,
    /// Momentum of gradient descent.
    pub momentum: f64,
    /// Where weight decay pulls to.
    pub decay_toward: DecayToward,
    /// The course of the learning rate.
    pub schedule: Schedule,
    /// Steps in which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// Where the learning rate of a schedule that falls ends, relative to `lr`.
    pub min_lr_ratio: f64,
    /// Largest L2 norm of the gradient of all that trains together.
    pub max_grad_norm: Option<f64>,
    /// Learning rates of the rows of single tokens, in the place of `lr`; the schedule applies to them too. The row of a token
    /// with 0 is frozen: it has no gradient and no decay, and keeps its bits.
    pub token_lr: Vec<(u32, f64)>,
    /// Norm that the rows of tokens are scaled to after each step.
    pub match_norm: Option<NormTarget>,
    /// Largest L2 norm of the row of a token after each step.
    pub max_row_norm: Option<f64>,
    /// When evaluations end the run before its last step.
    pub early_stopping: Option<EarlyStopping>,
    /// Whether the values of the best evaluation are remembered.
    pub keep_best: bool,
    /// Seed of the shuffle and of the gradient check.
    pub seed: u64,
    /// Whether each pass takes the examples in a new order.
    pub shuffle: bool,
    /// Whether activations are computed again in the backward pass instead of kept: less memory, more time.
    pub recompute: bool,
}

impl Default for TrainOptions {
    fn default() -> Self {
        let AdamConfig {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            ..
        } = AdamConfig::ADAMW;
        Self {
            steps: None,
            batch_size: 8,
            accumulate: 1,
            optimizer: OptimizerKind::default(),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            momentum: 0.0,
            decay_toward: DecayToward::default(),
            schedule: Schedule::default(),
            warmup_steps: 0,
            min_lr_ratio: 0.0,
            max_grad_norm: None,
            token_lr: Vec::new(),
            match_norm: None,
            max_row_norm: None,
            early_stopping: None,
            keep_best: false,
            seed: 0,
            shuffle: false,
            recompute: false,
        }
    }
}

/// More lines in a step are a slip: a run of a given number of steps wraps around its data, so that nothing else
/// bounds them.
const LARGEST_BATCH: usize = 1 << 16;

impl TrainOptions {
    /// The optimizer, its settings checked.
    pub(crate) fn build_optimizer(&self) -> Result<Box<dyn RowOptimizer>> {
        let weight_decay = if self.decay_toward == DecayToward::Zero {
            self.weight_decay
        } else {
            0.0
        };
        let Self {
            lr,
            beta1,
            beta2,
            eps,
            momentum,
            ..
        } = *self;
        let adam = |decay| {
            Adam::new(AdamConfig {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                decay,
                amsgrad: false,
            })
        };
        Ok(match self.optimizer {
            OptimizerKind::AdamW => Box::new(adam(Decay::Decoupled)?),
            OptimizerKind::Adam => Box::new(adam(Decay::L2)?),
            OptimizerKind::Sgd => Box::new(Sgd::new(SgdConfig {
                lr,
                momentum,
                weight_decay,
                ..SgdConfig::default()
            })?),
        })
    }

    /// The clipping of all gradients together.
    pub(crate) fn build_clip(&self) -> Result<Option<ClipGradNorm>> {
        Ok(self.max_grad_norm.map(ClipGradNorm::new).transpose()?)
    }

    /// The decay toward `original`, where training started from.
    pub(crate) fn build_decay(&self, original: &TokenRows) -> Result<Option<DecayTowardOriginal>> {
        Ok(match self.decay_toward {
            DecayToward::Zero => None,
            DecayToward::Original => Some(DecayTowardOriginal::new(self.weight_decay, original.clone())?),
        })
    }

    /// Checks what no constructor above does.
    pub(crate) fn check(&self) -> Result<()> {
        let at_least_one = |name: &str, value: usize| match value {
            0 => Err(Error::Setting(format!("{name} must be at least 1"))),
            _ => Ok(()),
        };
        at_least_one("batch-size", self.batch_size)?;
        at_least_one("accumulate", self.accumulate)?;
        if self.batch_size.saturating_mul(self.accumulate) > LARGEST_BATCH {
            let batches = match self.accumulate {
                1 => String::new(),
                batches => format!(" of {batches} batches"),
            };
            return Err(Error::Setting(format!(
                "batch-size{batches} is {}, but it must be at most {LARGEST_BATCH} in a step",
                self.batch_size
            )));
        }
        for (at, (id, lr)) in self.token_lr.iter().enumerate() {
            if !(*lr >= 0.0 && lr.is_finite()) {
                let message =
                    format!("the learning rate of token id {id} is {lr}, but it must be at least 0");
                return Err(Error::Setting(message));
            }
            if self.token_lr[..at].iter().any(|(other, _)| other == id) {
                let message = format!("token id {id} is given two learning rates");
                return Err(Error::Setting(message));
            }
        }
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            let message = format!(
                "min-lr-ratio is {}, but it must be from 0 to 1",
                self.min_lr_ratio
            );
            return Err(Error::Setting(message));
        }
        if self.min_lr_ratio > 0.0 && !self.schedule.ends_at_zero() {
            let message = "min-lr-ratio is for the schedules linear and cosine, which fall to 0 without it";
            return Err(Error::Setting(message.to_owned()));
        }
        if let Some(stopping) = self.early_stopping {
            stopping.check()?;
        }
        if self.steps == Some(0) {
            return Err(Error::Setting("steps must be at least 1".to_owned()));
        }
        Ok(())
    }
}

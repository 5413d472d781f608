//! Stochastic gradient descent.

use super::state::{expect_like, zeros_like};
use super::{OptimizerState, RowOptimizer, check, gradient_like};
use crate::rows::with_data;
use crate::{Element, Result, TokenRows};

/// Settings of [`Sgd`], named as in `torch.optim.SGD`; the defaults are torch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Factor on the buffer of past gradients; 0 keeps no buffer.
    pub momentum: f64,
    /// The current gradient enters the buffer times `1 - dampening` (the first one enters whole).
    pub dampening: f64,
    /// Nesterov's form of momentum.
    pub nesterov: bool,
    /// L2 penalty: `weight_decay * row` is added to the gradient.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        }
    }
}

/// `torch.optim.SGD` over rows.
#[derive(Clone, Debug)]
pub struct Sgd {
    config: SgdConfig,
    step: u64,
    momentum_buffer: Option<TokenRows>,
}

const MOMENTUM_BUFFER: &str = "momentum_buffer";

impl Sgd {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`](crate::Error::Hyperparameter), by torch's own rules.
    pub fn new(config: SgdConfig) -> Result<Self> {
        check("lr", config.lr, "at least 0", config.lr >= 0.0)?;
        check("momentum", config.momentum, "at least 0", config.momentum >= 0.0)?;
        check("dampening", config.dampening, "finite", true)?;
        check(
            "weight_decay",
            config.weight_decay,
            "at least 0",
            config.weight_decay >= 0.0,
        )?;
        if config.nesterov {
            check(
                "momentum",
                config.momentum,
                "above 0 for nesterov",
                config.momentum > 0.0,
            )?;
            check(
                "dampening",
                config.dampening,
                "0 for nesterov",
                config.dampening == 0.0,
            )?;
        }
        Ok(Self {
            config,
            step: 0,
            momentum_buffer: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> SgdConfig {
        self.config
    }
}

impl RowOptimizer for Sgd {
    fn step(&mut self, rows: &mut TokenRows, gradient: &TokenRows, lr: f64) -> Result<()> {
        check("lr", lr, "at least 0", lr >= 0.0)?;
        let gradient = gradient_like(rows, gradient)?;
        expect_like(MOMENTUM_BUFFER, self.momentum_buffer.as_ref(), rows)?;
        let first = self.momentum_buffer.is_none();
        if self.config.momentum != 0.0 && first {
            self.momentum_buffer = Some(zeros_like(rows));
        }
        let config = self.config;
        let buffer = self.momentum_buffer.as_mut();
        with_data!(rows.data_mut(), values => update(values, &gradient, buffer, first, config, lr));
        self.step = self.step.saturating_add(1);
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }

    fn steps_taken(&self) -> u64 {
        self.step
    }

    fn state(&self) -> OptimizerState {
        OptimizerState::collect(self.step, [(MOMENTUM_BUFFER, &self.momentum_buffer)])
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let step = state.step;
        self.momentum_buffer = if self.config.momentum == 0.0 {
            let [] = state.expand([])?;
            None
        } else {
            let [buffer] = state.expand([MOMENTUM_BUFFER])?;
            buffer
        };
        self.step = step;
        Ok(())
    }
}

/// torch's `_single_tensor_sgd`, every operation rounded to `T`.
fn update<T: Element>(
    rows: &mut [T],
    gradient: &TokenRows,
    buffer: Option<&mut TokenRows>,
    first: bool,
    config: SgdConfig,
    lr: f64,
) {
    let round = |x: T::Compute| T::from_compute(x).to_compute();
    let [minus_lr, momentum, weight_decay, undamped] =
        [-lr, config.momentum, config.weight_decay, 1.0 - config.dampening].map(T::Compute::from_f64);
    let decayed = |row: &T, gradient: &T| {
        let gradient = gradient.to_compute();
        if config.weight_decay == 0.0 {
            gradient
        } else {
            round(gradient + weight_decay * row.to_compute())
        }
    };
    let gradient = gradient.as_slice::<T>().unwrap_or_default();
    match buffer.and_then(TokenRows::as_mut_slice::<T>) {
        None => {
            for (row, gradient) in rows.iter_mut().zip(gradient) {
                *row = T::from_compute(row.to_compute() + minus_lr * decayed(row, gradient));
            }
        }
        Some(buffer) => {
            for ((row, gradient), buffer) in rows.iter_mut().zip(gradient).zip(buffer) {
                let gradient = decayed(row, gradient);
                let kept = if first {
                    gradient
                } else {
                    round(round(buffer.to_compute() * momentum) + undamped * gradient)
                };
                *buffer = T::from_compute(kept);
                let direction = if config.nesterov {
                    round(gradient + momentum * kept)
                } else {
                    kept
                };
                *row = T::from_compute(row.to_compute() + minus_lr * direction);
            }
        }
    }
}

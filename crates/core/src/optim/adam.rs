//! Adam, AdamW and AMSGrad.

use num_traits::Float;

use super::state::{expect_like, zeros_like};
use super::{OptimizerState, RowOptimizer, check, gradient_like};
use crate::rows::with_data;
use crate::{Element, Result, TokenRows};

/// How weight decay enters an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// `weight_decay * row` is added to the gradient (`torch.optim.Adam`).
    L2,
    /// Rows shrink by `lr * weight_decay` before the update (`torch.optim.AdamW`; Loshchilov and Hutter 2019).
    Decoupled,
}

/// Settings of [`Adam`], named as in `torch.optim.Adam`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Strength of the decay. The default is 0, unlike `torch.optim.AdamW`'s 0.01: decay pulls the rows of absent
    /// tokens toward zero.
    pub weight_decay: f64,
    /// How the decay enters.
    pub decay: Decay,
    /// Divide by the largest second moment so far (Reddi et al. 2018).
    pub amsgrad: bool,
}

impl AdamConfig {
    /// `torch.optim.Adam`'s defaults.
    pub const ADAM: Self = Self {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decay: Decay::L2,
        amsgrad: false,
    };
    /// `torch.optim.AdamW`'s defaults, but for a weight decay of 0.
    pub const ADAMW: Self = Self {
        decay: Decay::Decoupled,
        ..Self::ADAM
    };
}

/// `torch.optim.Adam`, `AdamW` and their AMSGrad forms over rows (Kingma and Ba 2015).
#[derive(Clone, Debug)]
pub struct Adam {
    config: AdamConfig,
    step: u64,
    exp_avg: Option<TokenRows>,
    exp_avg_sq: Option<TokenRows>,
    max_exp_avg_sq: Option<TokenRows>,
}

const EXP_AVG: &str = "exp_avg";
const EXP_AVG_SQ: &str = "exp_avg_sq";
const MAX_EXP_AVG_SQ: &str = "max_exp_avg_sq";

impl Adam {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`](crate::Error::Hyperparameter), by torch's own rules.
    pub fn new(config: AdamConfig) -> Result<Self> {
        let unit = 0.0..1.0;
        check("lr", config.lr, "at least 0", config.lr >= 0.0)?;
        check(
            "beta1",
            config.beta1,
            "at least 0 and below 1",
            unit.contains(&config.beta1),
        )?;
        check(
            "beta2",
            config.beta2,
            "at least 0 and below 1",
            unit.contains(&config.beta2),
        )?;
        check("eps", config.eps, "at least 0", config.eps >= 0.0)?;
        check(
            "weight_decay",
            config.weight_decay,
            "at least 0",
            config.weight_decay >= 0.0,
        )?;
        Ok(Self {
            config,
            step: 0,
            exp_avg: None,
            exp_avg_sq: None,
            max_exp_avg_sq: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> AdamConfig {
        self.config
    }
}

impl RowOptimizer for Adam {
    fn step(&mut self, rows: &mut TokenRows, gradient: &TokenRows, lr: f64) -> Result<()> {
        check("lr", lr, "at least 0", lr >= 0.0)?;
        let gradient = gradient_like(rows, gradient)?;
        expect_like(EXP_AVG, self.exp_avg.as_ref(), rows)?;
        expect_like(EXP_AVG_SQ, self.exp_avg_sq.as_ref(), rows)?;
        expect_like(MAX_EXP_AVG_SQ, self.max_exp_avg_sq.as_ref(), rows)?;
        self.step = self.step.saturating_add(1);
        let scalars = Scalars::new(&self.config, self.step, lr);
        let first = self.exp_avg.get_or_insert_with(|| zeros_like(rows));
        let second = self.exp_avg_sq.get_or_insert_with(|| zeros_like(rows));
        let largest = self
            .config
            .amsgrad
            .then(|| self.max_exp_avg_sq.get_or_insert_with(|| zeros_like(rows)));
        with_data!(rows.data_mut(), values => update(values, &gradient, first, second, largest, scalars));
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
        let tensors = [
            (EXP_AVG, &self.exp_avg),
            (EXP_AVG_SQ, &self.exp_avg_sq),
            (MAX_EXP_AVG_SQ, &self.max_exp_avg_sq),
        ];
        OptimizerState::collect(self.step, tensors)
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let step = state.step;
        if self.config.amsgrad {
            [self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq] =
                state.expand([EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ])?;
        } else {
            [self.exp_avg, self.exp_avg_sq] = state.expand([EXP_AVG, EXP_AVG_SQ])?;
        }
        self.step = step;
        Ok(())
    }
}

/// The numbers of one step; computed in `f64`, as Python does, then rounded once.
#[derive(Clone, Copy)]
struct Scalars {
    decoupled: Option<f64>,
    l2: Option<f64>,
    one_minus_beta1: f64,
    beta2: f64,
    one_minus_beta2: f64,
    minus_step_size: f64,
    bias_correction2_sqrt: f64,
    eps: f64,
}

impl Scalars {
    fn new(config: &AdamConfig, step: u64, lr: f64) -> Self {
        let decay = (config.weight_decay != 0.0).then_some(config.weight_decay);
        Self {
            decoupled: decay
                .filter(|_| config.decay == Decay::Decoupled)
                .map(|decay| 1.0 - lr * decay),
            l2: decay.filter(|_| config.decay == Decay::L2),
            one_minus_beta1: 1.0 - config.beta1,
            beta2: config.beta2,
            one_minus_beta2: 1.0 - config.beta2,
            minus_step_size: -(lr / (1.0 - power(config.beta1, step))),
            bias_correction2_sqrt: (1.0 - power(config.beta2, step)).sqrt(),
            eps: config.eps,
        }
    }
}

/// `base` to the power `exponent` by repeated squaring: the same bits on every machine, which `powi` does not promise.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent % 2 == 1 {
            result *= base;
        }
        exponent /= 2;
        base *= base;
    }
    result
}

/// torch's `_single_tensor_adam`, every operation rounded to `T`.
fn update<T: Element>(
    rows: &mut [T],
    gradient: &TokenRows,
    first: &mut TokenRows,
    second: &mut TokenRows,
    largest: Option<&mut TokenRows>,
    scalars: Scalars,
) {
    let round = |x: T::Compute| T::from_compute(x).to_compute();
    let number = T::Compute::from_f64;
    let [
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        minus_step_size,
        correction,
        eps,
    ] = [
        scalars.one_minus_beta1,
        scalars.beta2,
        scalars.one_minus_beta2,
        scalars.minus_step_size,
        scalars.bias_correction2_sqrt,
        scalars.eps,
    ]
    .map(number);
    let (decoupled, l2) = (scalars.decoupled.map(number), scalars.l2.map(number));
    let half = number(0.5);
    let gradient = gradient.as_slice::<T>().unwrap_or_default();
    let first = first.as_mut_slice::<T>().unwrap_or_default();
    let second = second.as_mut_slice::<T>().unwrap_or_default();
    // Without `largest` the loop must not ask for it each time: it is vectorised then.
    let element = |row: &mut T, gradient: T, first: &mut T, second: &mut T, largest: Option<&mut T>| {
        let mut value = row.to_compute();
        let mut gradient = gradient.to_compute();
        if let Some(keep) = decoupled {
            value = round(value * keep);
        }
        if let Some(l2) = l2 {
            gradient = round(gradient + l2 * value);
        }
        let old = first.to_compute();
        // torch's `lerp` takes the end that is nearer, for accuracy.
        let mean = if one_minus_beta1 < half {
            old + one_minus_beta1 * (gradient - old)
        } else {
            gradient - (gradient - old) * (number(1.0) - one_minus_beta1)
        };
        let mean = round(mean);
        let square = round(round(second.to_compute() * beta2) + one_minus_beta2 * gradient * gradient);
        *first = T::from_compute(mean);
        *second = T::from_compute(square);
        let square = match largest {
            None => square,
            Some(largest) => {
                // A NaN wins, as in `torch.maximum`.
                let most = if square > largest.to_compute() || square.is_nan() {
                    square
                } else {
                    largest.to_compute()
                };
                *largest = T::from_compute(most);
                most
            }
        };
        let denominator = round(round(round(square.sqrt()) / correction) + eps);
        *row = T::from_compute(value + minus_step_size * mean / denominator);
    };
    let all = rows.iter_mut().zip(gradient).zip(first).zip(second);
    match largest.and_then(TokenRows::as_mut_slice::<T>) {
        None => all.for_each(|(((row, gradient), first), second)| {
            element(row, *gradient, first, second, None);
        }),
        Some(largest) => {
            all.zip(largest)
                .for_each(|((((row, gradient), first), second), largest)| {
                    element(row, *gradient, first, second, Some(largest));
                });
        }
    }
}

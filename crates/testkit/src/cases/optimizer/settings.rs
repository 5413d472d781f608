//! What an optimizer accepts: settings, step counts, states.

use trainable_tokens_core::{
    Adam, AdamConfig, Decay, Error, ErrorKind, OptimizerState, RowOptimizer, Sgd, SgdConfig, TokenRows,
};

use super::{OPTIMIZERS, gradient};
use crate::failure::{Exact, close_within, ensure, equal, refused, same};
use crate::world::{World, noise};
use crate::{Failure, Harness, Outcome};

/// A setting that is not finite or out of its range is refused under torch's name; the edges are taken, and the
/// defaults are torch's, but for `AdamW`'s decay of 0.
pub fn settings_are_checked<H: Harness>() -> Outcome {
    fn sgd(change: impl FnOnce(&mut SgdConfig)) -> trainable_tokens_core::Result<()> {
        let mut config = SgdConfig::default();
        change(&mut config);
        Sgd::new(config).map(drop)
    }
    fn adam(change: impl FnOnce(&mut AdamConfig)) -> trainable_tokens_core::Result<()> {
        let mut config = AdamConfig::ADAMW;
        change(&mut config);
        Adam::new(config).map(drop)
    }
    let mut bad = vec![
        ("beta1", adam(|config| config.beta1 = 1.0)),
        ("beta2", adam(|config| config.beta2 = 1.0)),
        ("momentum", sgd(|config| config.nesterov = true)),
        (
            "dampening",
            sgd(|config| (config.nesterov, config.momentum, config.dampening) = (true, 0.9, 0.5)),
        ),
    ];
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-9] {
        bad.extend([
            ("lr", sgd(|config| config.lr = value)),
            ("momentum", sgd(|config| config.momentum = value)),
            ("weight_decay", sgd(|config| config.weight_decay = value)),
            ("lr", adam(|config| config.lr = value)),
            ("beta1", adam(|config| config.beta1 = value)),
            ("beta2", adam(|config| config.beta2 = value)),
            ("eps", adam(|config| config.eps = value)),
            ("weight_decay", adam(|config| config.weight_decay = value)),
        ]);
        if !value.is_finite() {
            bad.push(("dampening", sgd(|config| config.dampening = value)));
        }
    }
    for (setting, result) in bad {
        match result {
            Err(Error::Hyperparameter { name, .. }) => equal("the name", &name, &setting)?,
            other => return Err(Failure::new(format!("{setting} out of range gives {other:?}"))),
        }
    }
    sgd(|config| (config.lr, config.momentum, config.dampening) = (0.0, 0.9, -2.0))?;
    sgd(|config| (config.nesterov, config.momentum) = (true, 1e-9))?;
    adam(|config| (config.lr, config.beta1, config.beta2, config.eps) = (0.0, 0.0, 0.0, 0.0))?;
    let defaults = SgdConfig {
        lr: 1e-3,
        momentum: 0.0,
        dampening: 0.0,
        nesterov: false,
        weight_decay: 0.0,
    };
    equal("SGD's defaults", &SgdConfig::default(), &defaults)?;
    let defaults = |decay| AdamConfig {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decay,
        amsgrad: false,
    };
    equal("Adam's defaults", &AdamConfig::ADAM, &defaults(Decay::L2))?;
    equal(
        "AdamW's defaults",
        &AdamConfig::ADAMW,
        &defaults(Decay::Decoupled),
    )
}

/// The powers of the betas follow the step count however far; the largest count that a file can hold stays.
pub fn powers_follow_the_step_count<H: Harness>() -> Outcome {
    const BILLIONS: u64 = 1 << 31;
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let row_dtype = H::DTYPE.default_row_dtype();
    for (beta, count) in [(0.9, 0), (0.9, 1), (0.9, 9)]
        .into_iter()
        .chain([BILLIONS / 2, BILLIONS - 1, BILLIONS, 2 * BILLIONS, u64::MAX].map(|t| (1.0 - 1e-9, t)))
    {
        let config = AdamConfig {
            lr: 0.1,
            beta1: beta,
            beta2: beta,
            ..AdamConfig::ADAM
        };
        let (mut layer, mut adam) = (world.trained::<H>()?, Adam::new(config)?);
        if count > 0 {
            let mut squares = noise(2, row_dtype, 2, 3).to_f64_vec();
            squares.iter_mut().for_each(|x| *x = *x * *x + 0.1);
            let squares = TokenRows::new(squares, 2, 3)?.to_dtype(row_dtype);
            let tensors = vec![
                ("exp_avg".to_owned(), noise(1, row_dtype, 2, 3)),
                ("exp_avg_sq".to_owned(), squares),
            ];
            adam.load_state(OptimizerState { step: count, tensors })?;
        }
        layer.step_with(gradient::<H>(&world, 1), &mut adam, &mut [])?;
        let state = adam.state();
        equal("the step count", &state.step, &count.saturating_add(1))?;
        let rest = 1.0 - beta.powf(state.step as f64);
        let mut want = Exact::of(&world.rows::<H>());
        let [mean, square] = [0, 1].map(|at| Exact::of(&state.tensors[at].1).values);
        for (row, (mean, square)) in want.values.iter_mut().zip(mean.iter().zip(&square)) {
            *row -= 0.1 / rest * mean / ((square / rest).sqrt() + 1e-8);
        }
        // Powers of billions amplify the last bit of `beta`'s square by as much.
        close_within(
            &format!("rows at step {}", state.step),
            &layer.rows()?,
            &want,
            1e-5,
        )?;
    }
    Ok(())
}

/// A state whose tensors have another shape or type than the rows is refused by the step, which changes nothing.
pub fn a_state_of_other_rows_is_refused<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let dtype = H::DTYPE.default_row_dtype();
    for (name, new) in OPTIMIZERS {
        for (what, dtype, k, d) in [
            ("a state of more rows", dtype, 3, 3),
            ("a state of longer rows", dtype, 2, 4),
            ("a state of another type", crate::cases::other_dtype(dtype), 2, 3),
        ] {
            let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
            let mut rows = noise(1, dtype, k, d);
            optimizer.step(&mut rows, &noise(2, dtype, k, d), 0.1)?;
            let state = optimizer.state();
            if state.tensors.is_empty() {
                continue;
            }
            let mut other = world.rows::<H>();
            let alone = optimizer.step(&mut other, &gradient::<H>(&world, 0), 0.1);
            ensure!(
                matches!(alone, Err(Error::OptimizerState { .. })),
                "{name}: {what} gives {alone:?}"
            );
            let step = layer.step_with(gradient::<H>(&world, 0), &mut *optimizer, &mut []);
            refused(what, step, ErrorKind::Shape)?;
            same(name, &layer.rows()?, &world.rows::<H>())?;
            equal(name, &optimizer.state(), &state)?;
        }
    }
    Ok(())
}

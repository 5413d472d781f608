//! The shared optimizers over the framework's rows.

mod settings;

use trainable_tokens_core::{
    Adam, AdamConfig, DeltaStore, ErrorKind, RowOptimizer, Sgd, SgdConfig, TokenRows,
};

use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, noise, whole};
use crate::{Failure, Harness, HeadPass, Outcome, Pass};

pub use settings::{a_state_of_other_rows_is_refused, powers_follow_the_step_count, settings_are_checked};

type NewOptimizer = fn() -> trainable_tokens_core::Result<Box<dyn RowOptimizer>>;

fn sgd(change: fn(&mut SgdConfig)) -> trainable_tokens_core::Result<Box<dyn RowOptimizer>> {
    let mut config = SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    };
    change(&mut config);
    Ok(Box::new(Sgd::new(config)?))
}

fn adam(config: AdamConfig) -> trainable_tokens_core::Result<Box<dyn RowOptimizer>> {
    Ok(Box::new(Adam::new(AdamConfig { lr: 0.1, ..config })?))
}

/// Every update rule, with and without what it remembers.
const OPTIMIZERS: [(&str, NewOptimizer); 7] = [
    ("sgd", || sgd(|_| {})),
    ("sgd with momentum and dampening", || {
        sgd(|config| (config.momentum, config.dampening) = (0.9, 0.3))
    }),
    ("sgd with Nesterov's momentum and decay", || {
        sgd(|config| (config.momentum, config.nesterov, config.weight_decay) = (0.9, true, 0.1))
    }),
    ("adam", || adam(AdamConfig::ADAM)),
    ("adam with L2 decay", || {
        adam(AdamConfig {
            weight_decay: 0.1,
            ..AdamConfig::ADAM
        })
    }),
    ("amsgrad", || {
        adam(AdamConfig {
            amsgrad: true,
            ..AdamConfig::ADAM
        })
    }),
    ("adamw", || {
        adam(AdamConfig {
            weight_decay: 0.1,
            ..AdamConfig::ADAMW
        })
    }),
];

fn gradient<H: Harness>(world: &World, step: u64) -> TokenRows {
    noise(
        world.seed ^ (step << 8),
        H::DTYPE.default_row_dtype(),
        world.tokens.len(),
        world.d,
    )
}

/// Given equal gradients, the rows move exactly as they do on the host alone.
pub fn equal_gradients_give_equal_bits<H: Harness>() -> Outcome {
    for_all(|world| {
        for (name, new) in OPTIMIZERS {
            let mut layer = world.trained::<H>()?;
            let (mut optimizer, mut alone, mut rows) = (new()?, new()?, world.rows::<H>());
            for step in 0..4 {
                let gradient = gradient::<H>(world, step);
                let lr = alone.learning_rate();
                alone.step(&mut rows, &gradient, lr)?;
                let report = layer.step_with(gradient, &mut *optimizer, &mut [])?;
                equal("the step's number", &report.step, &(step + 1))?;
                same(&format!("{name}: rows after step {step}"), &layer.rows()?, &rows)?;
            }
            equal(name, &optimizer.state(), &alone.state())?;
        }
        Ok(())
    })
}

/// A step from the framework's gradients is a step from these gradients on the host.
pub fn a_step_takes_the_frameworks_gradients<H: Harness>() -> Outcome {
    for_all(|world| {
        if world.tokens.is_empty() {
            return Ok(());
        }
        let [mut layer, mut other] = [world.trained::<H>()?, world.trained::<H>()?];
        let pass = Pass {
            lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
            ..Pass::default()
        };
        let gradients = H::backward(&layer, &pass)?.gradients;
        let on_host = layer.gradient(&gradients)?;
        let (mut first, mut second) = (OPTIMIZERS[6].1()?, OPTIMIZERS[6].1()?);
        let report = layer.step(&gradients, &mut *first, &mut [])?;
        equal("gradient norm", &report.grad_norm, &on_host.norm())?;
        other.step_with(on_host, &mut *second, &mut [])?;
        same("rows", &layer.rows()?, &other.rows()?)
    })
}

/// Training writes no row of the base.
pub fn training_leaves_the_base<H: Harness>() -> Outcome {
    for_all(|world| {
        let (mut layer, mut optimizer) = (world.trained::<H>()?, OPTIMIZERS[6].1()?);
        for step in 0..3 {
            if !world.tokens.is_empty() {
                let pass = Pass {
                    lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
                    heads: vec![HeadPass::new(world.hidden::<H>(), world.logits_upstream::<H>())],
                    ..Pass::default()
                };
                let gradients = H::backward(&layer, &pass)?.gradients;
                layer.step(&gradients, &mut *optimizer, &mut [])?;
            }
            layer.step_with(gradient::<H>(world, step), &mut *optimizer, &mut [])?;
        }
        same("the base", &whole::<H>(&layer)?, &world.table::<H>())
    })
}

/// Training moves the rows.
pub fn training_moves_the_rows<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[5, 2, 0]);
    for (name, new) in OPTIMIZERS {
        let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
        let pass = Pass {
            lookups: vec![(layer.plan(&world.ids)?, world.upstream::<H>())],
            ..Pass::default()
        };
        let gradients = H::backward(&layer, &pass)?.gradients;
        layer.step(&gradients, &mut *optimizer, &mut [])?;
        let (before, after) = (world.rows::<H>().to_f64_vec(), layer.rows()?.to_f64_vec());
        ensure!(
            before.iter().zip(&after).all(|(x, y)| x != y),
            "{name}: a row did not move"
        );
    }
    Ok(())
}

/// A run that is interrupted and resumed from its rows and the optimizer's state ends with the same bits.
pub fn a_resumed_run_ends_with_the_same_bits<H: Harness>() -> Outcome {
    for_all(|world| {
        for (name, new) in OPTIMIZERS {
            let (mut whole, mut optimizer) = (world.trained::<H>()?, new()?);
            let mut saved = None;
            for step in 0..5 {
                if step == 2 {
                    saved = Some((whole.rows()?, optimizer.state()));
                }
                whole.step_with(gradient::<H>(world, step), &mut *optimizer, &mut [])?;
            }
            let (rows, state) = saved.ok_or("nothing was saved")?;
            let (mut resumed, mut optimizer) = (world.fresh::<H>()?, new()?);
            resumed.set_rows(&rows)?;
            optimizer.load_state(state)?;
            for step in 2..5 {
                resumed.step_with(gradient::<H>(world, step), &mut *optimizer, &mut [])?;
            }
            same(name, &resumed.rows()?, &whole.rows()?)?;
        }
        Ok(())
    })
}

/// Rows whose token is absent still move by momentum and moments: the update is dense, as torch's is.
pub fn updates_are_dense<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let dtype = H::DTYPE.default_row_dtype();
    for (name, new) in &OPTIMIZERS[1..] {
        let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
        layer.step_with(gradient::<H>(&world, 0), &mut *optimizer, &mut [])?;
        let before = layer.rows()?.to_f64_vec();
        layer.step_with(TokenRows::zeros(dtype, 2, 3), &mut *optimizer, &mut [])?;
        let after = layer.rows()?.to_f64_vec();
        ensure!(
            before.iter().zip(&after).all(|(x, y)| x != y),
            "{name}: a row stood still"
        );
    }
    Ok(())
}

/// The optimizer's memory has the shape and the type of the rows, under torch's names.
pub fn memory_is_like_the_rows<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let names: [&[&str]; 7] = [
        &[],
        &["momentum_buffer"],
        &["momentum_buffer"],
        &["exp_avg", "exp_avg_sq"],
        &["exp_avg", "exp_avg_sq"],
        &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        &["exp_avg", "exp_avg_sq"],
    ];
    for ((name, new), names) in OPTIMIZERS.iter().zip(names) {
        let (mut layer, mut optimizer) = (world.trained::<H>()?, new()?);
        layer.step_with(gradient::<H>(&world, 0), &mut *optimizer, &mut [])?;
        let state = optimizer.state();
        let have: Vec<&str> = state.tensors.iter().map(|(name, _)| name.as_str()).collect();
        equal(name, &have, &names.to_vec())?;
        for (_, tensor) in &state.tensors {
            equal(name, &tensor.shape(), &[2, 3])?;
            equal(name, &tensor.dtype(), &layer.delta()?.dtype())?;
        }
    }
    Ok(())
}

/// A gradient of another shape and a learning rate that is none are refused; neither rows nor optimizer change.
pub fn a_refused_step_changes_nothing<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let dtype = H::DTYPE.default_row_dtype();
    let (mut layer, mut optimizer) = (world.trained::<H>()?, OPTIMIZERS[3].1()?);
    layer.step_with(gradient::<H>(&world, 0), &mut *optimizer, &mut [])?;
    let (rows, state) = (layer.rows()?, optimizer.state());
    for (k, d) in [(1, 3), (3, 3), (2, 4)] {
        let gradient = TokenRows::zeros(dtype, k, d);
        refused(
            "the gradient",
            layer.step_with(gradient, &mut *optimizer, &mut []),
            ErrorKind::Shape,
        )?;
    }
    for lr in [f64::NAN, f64::INFINITY, -0.1] {
        optimizer.set_learning_rate(lr);
        let step = layer.step_with(gradient::<H>(&world, 1), &mut *optimizer, &mut []);
        refused("the learning rate", step, ErrorKind::Hyperparameter)?;
    }
    same("rows", &layer.rows()?, &rows)?;
    equal("state", &optimizer.state(), &state)?;
    optimizer
        .load_state(state)
        .map_err(|error| Failure::new(error.to_string()))
}

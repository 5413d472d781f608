//! What happens around a step.

use trainable_tokens_core::{
    BackendError, ClampRowNorm, ClipGradNorm, DecayTowardOriginal, Error, ErrorKind, MatchRowNorm,
    OptimizerHook, Result, Sgd, SgdConfig, StepContext, TokenRows,
};

use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, noise};
use crate::{Failure, Harness, Outcome};

fn world() -> World {
    World::fixed(7, 3, &[5, 2], &[])
}

fn sgd(lr: f64) -> Result<Sgd> {
    Sgd::new(SgdConfig {
        lr,
        ..SgdConfig::default()
    })
}

fn gradient<H: Harness>() -> TokenRows {
    noise(1, H::DTYPE.default_row_dtype(), 2, 3)
}

/// Writes down when it is called.
struct Diary<'a>(&'static str, &'a std::cell::RefCell<Vec<String>>);

impl OptimizerHook for Diary<'_> {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.1
            .borrow_mut()
            .push(format!("{} before {}", self.0, context.step));
        Ok(())
    }
    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.1
            .borrow_mut()
            .push(format!("{} after {}", self.0, context.step));
        Ok(())
    }
}

/// Hooks run in the order given, before the update and again after it.
pub fn hooks_run_in_order<H: Harness>() -> Outcome {
    let diary = std::cell::RefCell::default();
    let (mut layer, mut sgd) = (world().trained::<H>()?, sgd(0.1)?);
    for _ in 0..2 {
        let hooks: &mut [&mut dyn OptimizerHook] = &mut [&mut Diary("a", &diary), &mut Diary("b", &diary)];
        layer.step_with(gradient::<H>(), &mut sgd, hooks)?;
    }
    let want = [
        "a before 1",
        "b before 1",
        "a after 1",
        "b after 1",
        "a before 2",
        "b before 2",
        "a after 2",
        "b after 2",
    ];
    equal("calls", &diary.into_inner(), &want.map(str::to_owned).to_vec())
}

/// Sees everything and changes everything that a hook may.
struct Changes {
    seen: Vec<(Vec<u32>, TokenRows, TokenRows, f64)>,
    rows_after: Option<TokenRows>,
}

impl OptimizerHook for Changes {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        let tokens = context.tokens.to_vec();
        self.seen.push((
            tokens,
            context.rows.clone(),
            context.gradient.clone(),
            context.learning_rate,
        ));
        context.gradient.scale(0.0);
        context.rows.scale(0.5);
        context.learning_rate = 0.25;
        Ok(())
    }
    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.rows_after = Some(context.rows.clone());
        context.rows.scale(4.0);
        Ok(())
    }
}

/// A hook sees tokens, rows, gradient and learning rate, and what it changes counts.
pub fn a_hook_sees_and_changes_the_step<H: Harness>() -> Outcome {
    let (mut layer, mut sgd) = (world().trained::<H>()?, sgd(0.1)?);
    let mut hook = Changes {
        seen: Vec::new(),
        rows_after: None,
    };
    let report = layer.step_with(gradient::<H>(), &mut sgd, &mut [&mut hook])?;
    let (tokens, rows, seen_gradient, lr) = hook.seen.pop().ok_or("the hook was not called")?;
    equal("tokens", &tokens, &vec![5, 2])?;
    same("rows before", &rows, &world().rows::<H>())?;
    same("gradient", &seen_gradient, &gradient::<H>())?;
    equal("learning rate", &lr, &0.1)?;
    equal("learning rate of the report", &report.learning_rate, &0.25)?;
    equal("norm of the report", &report.grad_norm, &gradient::<H>().norm())?;
    let mut want = world().rows::<H>();
    want.scale(0.5);
    same(
        "rows after",
        &hook.rows_after.ok_or("the hook was not called")?,
        &want,
    )?;
    want.scale(4.0);
    same("rows at the end", &layer.rows()?, &want)
}

/// A learning rate that a hook sets counts for one step.
pub fn a_hooks_learning_rate_counts_once<H: Harness>() -> Outcome {
    struct Once(bool);
    impl OptimizerHook for Once {
        fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
            if !std::mem::replace(&mut self.0, true) {
                context.learning_rate = 0.5;
            }
            Ok(())
        }
    }
    let (mut layer, mut sgd, mut hook) = (world().trained::<H>()?, sgd(0.125)?, Once(false));
    let mut rates = Vec::new();
    for _ in 0..2 {
        rates.push(
            layer
                .step_with(gradient::<H>(), &mut sgd, &mut [&mut hook])?
                .learning_rate,
        );
    }
    equal("learning rates", &rates, &vec![0.5, 0.125])
}

/// An error of a hook before the update cancels it and is handed on.
pub fn a_failing_hook_cancels_the_step<H: Harness>() -> Outcome {
    struct Fails;
    impl OptimizerHook for Fails {
        fn before_step(&mut self, _: &mut StepContext<'_>) -> Result<()> {
            Err(Error::NoGradient)
        }
    }
    /// Changes the rows before the other one fails.
    struct Halves;
    impl OptimizerHook for Halves {
        fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
            context.rows.scale(0.5);
            Ok(())
        }
    }
    let (mut layer, mut sgd) = (world().trained::<H>()?, sgd(0.1)?);
    let Err(error) = layer.step_with(gradient::<H>(), &mut sgd, &mut [&mut Halves, &mut Fails]) else {
        return Err(Failure::new("the step is taken although a hook failed"));
    };
    equal("kind of error", &error.kind(), &Error::NoGradient.kind())?;
    same("rows", &layer.rows()?, &world().rows::<H>())?;
    equal(
        "steps",
        &trainable_tokens_core::RowOptimizer::steps_taken(&sgd),
        &0,
    )
}

/// An error of a hook after the update is handed on; the update stands, in the rows and in the optimizer.
pub fn a_hook_that_fails_late_keeps_the_update<H: Harness>() -> Outcome {
    struct FailsLate;
    impl OptimizerHook for FailsLate {
        fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
            context.rows.scale(0.0);
            Err(Error::NoGradient)
        }
    }
    let [mut layer, mut other] = [world().trained::<H>()?, world().trained::<H>()?];
    let mut optimizer = sgd(0.1)?;
    let Err(error) = layer.step_with(gradient::<H>(), &mut optimizer, &mut [&mut FailsLate]) else {
        return Err(Failure::new("the error of a hook is lost"));
    };
    equal("kind of error", &error.kind(), &Error::NoGradient.kind())?;
    other.step_with(gradient::<H>(), &mut sgd(0.1)?, &mut [])?;
    same("rows", &layer.rows()?, &other.rows()?)?;
    equal(
        "steps",
        &trainable_tokens_core::RowOptimizer::steps_taken(&optimizer),
        &1,
    )
}

/// A hook that changes a shape or an element type fails the step, and the rows are as before.
pub fn a_hook_may_not_reshape<H: Harness>() -> Outcome {
    struct Reshapes(fn(&mut StepContext<'_>));
    impl OptimizerHook for Reshapes {
        fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
            (self.0)(context);
            Ok(())
        }
    }
    let changes: [fn(&mut StepContext<'_>); 4] = [
        |context| *context.rows = TokenRows::zeros(context.rows.dtype(), 1, 3),
        |context| {
            *context.rows = context
                .rows
                .to_dtype(crate::cases::other_dtype(context.rows.dtype()));
        },
        |context| *context.gradient = TokenRows::zeros(context.gradient.dtype(), 2, 4),
        |context| {
            *context.gradient = context
                .gradient
                .to_dtype(crate::cases::other_dtype(context.gradient.dtype()));
        },
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let (mut layer, mut sgd) = (world().trained::<H>()?, sgd(0.1)?);
        let kind = if at % 2 == 0 {
            ErrorKind::Shape
        } else {
            ErrorKind::DType
        };
        let step = layer.step_with(gradient::<H>(), &mut sgd, &mut [&mut Reshapes(change)]);
        refused("the change", step, kind)?;
        same("rows", &layer.rows()?, &world().rows::<H>())?;
    }
    Ok(())
}

/// Clipping scales a long gradient down to the norm, over all rows together, and leaves a short one.
pub fn clipping_limits_the_norm<H: Harness>() -> Outcome {
    let before = world().rows::<H>().to_f64_vec();
    for limit in [0.25, 100.0] {
        let (mut layer, mut sgd, mut clip) = (world().trained::<H>()?, sgd(1.0)?, ClipGradNorm::new(limit)?);
        layer.step_with(gradient::<H>(), &mut sgd, &mut [&mut clip])?;
        let after = layer.rows()?.to_f64_vec();
        let moved = before
            .iter()
            .zip(&after)
            .map(|(x, y)| (x - y).powi(2))
            .sum::<f64>()
            .sqrt();
        let want = gradient::<H>().norm().min(limit);
        ensure!(
            (moved - want).abs() <= 1e-5,
            "rows moved by {moved}, expected {want}"
        );
    }
    Ok(())
}

/// Decay pulls rows toward where they started, not toward zero.
pub fn decay_pulls_toward_the_original<H: Harness>() -> Outcome {
    let (mut layer, mut sgd) = (world().trained::<H>()?, sgd(0.5)?);
    let original = noise(9, H::DTYPE.default_row_dtype(), 2, 3);
    let mut decay = DecayTowardOriginal::new(0.5, original.clone())?;
    let zero = TokenRows::zeros(original.dtype(), 2, 3);
    layer.step_with(zero, &mut sgd, &mut [&mut decay])?;
    let pairs = world()
        .rows::<H>()
        .to_f64_vec()
        .into_iter()
        .zip(original.to_f64_vec());
    for ((row, original), got) in pairs.zip(layer.rows()?.to_f64_vec()) {
        let want = row - 0.25 * (row - original);
        ensure!((got - want).abs() <= 1e-6, "an element is {got}, expected {want}");
    }
    Ok(())
}

/// Steps with a hook, and without; the rows of both.
fn with_and_without<H: Harness>(hook: &mut dyn OptimizerHook) -> Result<[TokenRows; 2], Failure> {
    let [mut layer, mut plain] = [world().trained::<H>()?, world().trained::<H>()?];
    layer.step_with(gradient::<H>(), &mut sgd(0.1)?, &mut [hook])?;
    plain.step_with(gradient::<H>(), &mut sgd(0.1)?, &mut [])?;
    Ok([layer.rows()?, plain.rows()?])
}

/// Each row of `got` points where that of `plain` does and has the norm that `want` tells for it.
fn expect_norms(got: &TokenRows, plain: &TokenRows, want: impl Fn(usize, f64) -> f64) -> Outcome {
    let dim = plain.embedding_dim();
    let scaled = plain.row_norms().into_iter().enumerate();
    let scaled = scaled.flat_map(|(row, norm)| {
        let factor = want(row, norm) / norm;
        let values = plain.to_f64_vec()[row * dim..][..dim].to_vec();
        values.into_iter().map(move |value| value * factor)
    });
    for (got, want) in got.to_f64_vec().into_iter().zip(scaled) {
        let close = (got - want).abs() <= 1e-6 * want.abs();
        ensure!(close, "an element is {got}, expected {want}");
    }
    Ok(())
}

/// Rows that have become longer than the norm are scaled down to it; shorter ones keep their bits.
pub fn rows_are_clamped_to_a_norm<H: Harness>() -> Outcome {
    let norms = with_and_without::<H>(&mut ClampRowNorm::new(1e6)?)?[1].row_norms();
    let between = norms.iter().sum::<f64>() / norms.len() as f64;
    let [got, plain] = with_and_without::<H>(&mut ClampRowNorm::new(between)?)?;
    expect_norms(&got, &plain, |_, norm| norm.min(between))?;
    let (got, plain, dim) = (got.to_f64_vec(), plain.to_f64_vec(), plain.embedding_dim());
    for (row, norm) in norms.into_iter().enumerate() {
        let kept = got[row * dim..][..dim] == plain[row * dim..][..dim];
        equal("whether a row is kept", &kept, &(norm <= between))?;
    }
    for bad in [0.0, -1.0, f64::NAN] {
        refused("the norm", ClampRowNorm::new(bad), ErrorKind::Hyperparameter)?;
    }
    Ok(())
}

/// Every row is scaled to the norm that is given for it.
pub fn rows_are_scaled_to_their_norms<H: Harness>() -> Outcome {
    let norms = [0.5, 3.0];
    let [got, plain] = with_and_without::<H>(&mut MatchRowNorm::new(norms.to_vec())?)?;
    expect_norms(&got, &plain, |row, _| norms[row])?;
    let step = with_and_without::<H>(&mut MatchRowNorm::new(vec![1.0])?);
    ensure!(step.is_err(), "one norm for two rows is taken");
    refused(
        "the norm",
        MatchRowNorm::new(vec![0.0]),
        ErrorKind::Hyperparameter,
    )
}

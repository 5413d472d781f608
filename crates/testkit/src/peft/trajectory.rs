//! Steps of an optimizer, by the framework's gradients.

use serde_json::Value;
use trainable_tokens_core::{DType, TokenRows};

use super::adapters::Trained;
use super::compare::Tolerance;
use super::fixture::Fixture;
use super::gradients::backward;
use super::layers::{input, layer, output};
use super::optimizer::optimizer;
use super::value::{count, only, text};
use crate::failure::{ensure, equal, same};
use crate::world::{lookup, whole};
use crate::{Failure, Harness, Layer, Outcome, tolerance};

/// Takes the steps of a trajectory, comparing every gradient and all rows after every step; beside it, the optimizer
/// alone follows the recorded gradients.
pub(super) fn run<H: Harness>(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = [
        "op",
        "name",
        "optimizer",
        "steps",
        "loss",
        "inputs",
        "expect",
        "atol",
        "rtol",
        "note",
    ];
    only("the operation", operation, &known)?;
    let module = fixture.first();
    let steps = count(operation, "steps")?;
    ensure!(steps > 0, "it has no step");
    let tolerance = Tolerance::of(operation)?;
    let k = fixture.tokens().len();
    let [deltas, recorded] = ["deltas", "grads"].map(|name| fixture.rows(text(&operation["expect"], name)?));
    let (deltas, recorded) = (deltas?, recorded?);
    let ids = fixture.ids(text(&operation["inputs"], "ids")?)?;
    ensure!(
        ids.len().is_multiple_of(steps),
        "{} ids in {steps} steps",
        ids.len()
    );
    let batch = ids.len() / steps;
    let loss = Loss::read(fixture, operation)?;
    let losses = fixture
        .rows(&format!("traj.{}.losses", text(operation, "name")?))?
        .to_f64_vec();
    equal("recorded losses", &losses.len(), &steps)?;

    let mut alone = fixture.initial_rows()?;
    let (mut first, mut second) = (
        optimizer(&operation["optimizer"])?.build()?,
        optimizer(&operation["optimizer"])?.build()?,
    );
    let adapter = Trained {
        name: "default".to_owned(),
        tokens: fixture.tokens().clone(),
        rows: alone.clone(),
    };
    let mut layer = layer::<H>(module, &[adapter])?;
    let start = output::<H>(module, layer.rows()?, &deltas);
    same("rows before the first step", &start, &part(&deltas, 0, k)?)?;
    for step in 0..steps {
        let ids = &ids[step * batch..][..batch];
        let (gradient, after) = (part(&recorded, step, k)?, part(&deltas, step + 1, k)?);

        loss.check::<H>(fixture, &layer, ids, step, losses[step])?;
        let upstream = loss.upstream::<H>(fixture, &layer, ids, step)?;
        let gradients = backward::<H>(&layer, ids, &upstream)?;
        let got = output::<H>(module, layer.gradient(&gradients)?, &gradient);
        tolerance.check(&format!("gradient of step {step}"), &got, &gradient)?;
        let report = layer.step(&gradients, &mut *first, &mut [])?;
        equal("the step's number", &report.step, &(step as u64 + 1))?;
        let got = output::<H>(module, layer.rows()?, &after);
        tolerance.check(&format!("rows after step {step}"), &got, &after)?;

        let lr = second.learning_rate();
        second.step(&mut alone, &gradient, lr)?;
        let exact = match alone.dtype() {
            DType::F64 | DType::F32 => Tolerance::both(2e-6),
            // torch's CPU kernels round factors to half types where the library computes with them in f32.
            DType::F16 | DType::BF16 => tolerance,
        };
        exact.check(
            &format!("the optimizer alone, rows after step {step}"),
            &alone,
            &after,
        )?;
    }
    same("the table", &whole::<H>(&layer)?, &input::<H>(fixture.table()))
}

/// Rows `index * rows ..` of `all`, `rows` of them.
pub(super) fn part(all: &TokenRows, index: usize, rows: usize) -> Result<TokenRows, Failure> {
    let columns = all.embedding_dim();
    let size = rows * columns * all.dtype().size_in_bytes();
    let bytes = all.to_le_bytes();
    let bytes = bytes
        .get(index * size..(index + 1) * size)
        .ok_or_else(|| Failure::new(format!("nothing is recorded for step {index}")))?;
    Ok(TokenRows::from_le_bytes(all.dtype(), rows, columns, bytes)?)
}

/// What is minimized.
enum Loss {
    /// The sum of the output times an upstream gradient of each step.
    Linear(TokenRows),
    /// The mean of the squared difference of the output, in `f32`, from a target.
    MeanSquare(TokenRows),
}

impl Loss {
    fn read(fixture: &Fixture, operation: &Value) -> Result<Self, Failure> {
        let input = |name| fixture.rows(text(&operation["inputs"], name)?);
        match text(operation, "loss")? {
            "sum(emb * traj.upstream[t])" => Ok(Self::Linear(input("upstream")?)),
            "mean((emb.float() - traj.mse_target)^2)" => Ok(Self::MeanSquare(input("target")?)),
            other => Err(Failure::new(format!("the loss {other} is unknown"))),
        }
    }

    /// Compares its value with PEFT's, which is computed in the type of the case's table.
    fn check<H: Harness>(
        &self,
        fixture: &Fixture,
        layer: &Layer<H>,
        ids: &[u32],
        step: usize,
        want: f64,
    ) -> Outcome {
        let (table, tensors) = (fixture.table(), lookup::<H>(layer, ids)?);
        let got = output::<H>(fixture.first(), tensors, table).to_f64_vec();
        let (terms, count): (Vec<f64>, f64) = match self {
            Self::Linear(upstream) => {
                let upstream = part(upstream, step, ids.len())?.to_f64_vec();
                (got.iter().zip(upstream).map(|(x, y)| x * y).collect(), 1.0)
            }
            Self::MeanSquare(target) => {
                let target = target.to_f64_vec();
                let n = f64::from(u32::try_from(target.len())?);
                (got.iter().zip(target).map(|(x, y)| (x - y).powi(2)).collect(), n)
            }
        };
        let value = terms.iter().sum::<f64>() / count;
        let size = terms.iter().map(|term| term.abs()).sum::<f64>() / count;
        let allowed = tolerance(table.dtype()) * size;
        ensure!(
            (value - want).abs() <= allowed,
            "loss of step {step} is {value}, expected {want} within {allowed:.1e}"
        );
        Ok(())
    }

    /// Its gradient by the output for `ids`, in the type of the case's table.
    fn upstream<H: Harness>(
        &self,
        fixture: &Fixture,
        layer: &Layer<H>,
        ids: &[u32],
        step: usize,
    ) -> Result<TokenRows, Failure> {
        let target = match self {
            Self::Linear(upstream) => return part(upstream, step, ids.len()),
            Self::MeanSquare(target) => target,
        };
        let got = output::<H>(fixture.first(), lookup::<H>(layer, ids)?, fixture.table());
        equal("the output's shape", &got.shape(), &target.shape())?;
        let (got, target) = (got.to_f32_vec(), target.to_f32_vec());
        let n = f32::from(u16::try_from(target.len())?);
        let gradient = got.iter().zip(&target).map(|(x, target)| 2.0 * (x - target) / n);
        let [rows, columns] = [ids.len(), fixture.table().embedding_dim()];
        Ok(TokenRows::new(gradient.collect(), rows, columns)?.to_dtype(fixture.table().dtype()))
    }
}

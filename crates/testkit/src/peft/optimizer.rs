//! The optimizers that PEFT's cases train with.

use serde_json::Value;
use trainable_tokens_core::{AdamConfig, Decay, SgdConfig};

use super::value::{flag, number, text};
use crate::Failure;
use crate::vectors::OptimizerSpec;

/// Reads the optimizer of a trajectory: what is not named has the default of `torch.optim`.
///
/// # Errors
///
/// For an optimizer or a setting that is not known.
pub fn optimizer(spec: &Value) -> Result<OptimizerSpec, Failure> {
    match text(spec, "type")? {
        "SGD" => sgd(spec),
        "Adam" => adam(spec, AdamConfig::ADAM),
        "AdamW" => adam(
            spec,
            AdamConfig {
                // torch's default; the library's is no decay.
                weight_decay: 0.01,
                ..AdamConfig::ADAMW
            },
        ),
        other => Err(Failure::new(format!("the optimizer {other} is unknown"))),
    }
}

fn sgd(spec: &Value) -> Result<OptimizerSpec, Failure> {
    let mut config = SgdConfig::default();
    for name in names(spec)? {
        match name {
            "lr" => config.lr = number(spec, name)?,
            "momentum" => config.momentum = number(spec, name)?,
            "dampening" => config.dampening = number(spec, name)?,
            "nesterov" => config.nesterov = flag(spec, name)?,
            "weight_decay" => config.weight_decay = number(spec, name)?,
            _ => return Err(unknown(name)),
        }
    }
    Ok(OptimizerSpec::Sgd {
        lr: config.lr,
        momentum: config.momentum,
        dampening: config.dampening,
        nesterov: config.nesterov,
        weight_decay: config.weight_decay,
    })
}

fn adam(spec: &Value, mut config: AdamConfig) -> Result<OptimizerSpec, Failure> {
    for name in names(spec)? {
        match name {
            "lr" => config.lr = number(spec, name)?,
            "betas" => {
                let beta = |at: usize| spec["betas"][at].as_f64().ok_or("betas are not two numbers");
                (config.beta1, config.beta2) = (beta(0)?, beta(1)?);
            }
            "eps" => config.eps = number(spec, name)?,
            "weight_decay" => config.weight_decay = number(spec, name)?,
            "amsgrad" => config.amsgrad = flag(spec, name)?,
            _ => return Err(unknown(name)),
        }
    }
    Ok(OptimizerSpec::Adam {
        lr: config.lr,
        beta1: config.beta1,
        beta2: config.beta2,
        eps: config.eps,
        weight_decay: config.weight_decay,
        decoupled: config.decay == Decay::Decoupled,
        amsgrad: config.amsgrad,
    })
}

/// The names of all settings.
fn names(spec: &Value) -> Result<impl Iterator<Item = &str>, Failure> {
    let settings = spec.as_object().ok_or("the optimizer is no object")?;
    Ok(settings.keys().map(String::as_str).filter(|name| *name != "type"))
}

fn unknown(name: &str) -> Failure {
    Failure::new(format!("the setting {name} of the optimizer is unknown"))
}

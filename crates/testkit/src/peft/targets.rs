//! Which modules of a model PEFT targets.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use trainable_tokens_format::{Adapter, AdapterConfig, AdapterModule, Error, ModelTables, TargetedTable};

use super::fixture::Fixture;
use super::value::{only, text, texts};
use crate::failure::{ensure, equal};
use crate::{Failure, Outcome};

/// The modules that `target_modules` means, given and as PEFT wrote it into the file.
pub(super) fn matched(fixture: &Fixture) -> Outcome {
    let stated = fixture.json();
    let model = toy(fixture)?;
    let given = config(fixture, &stated["target_modules_given"])?;
    if stated["peft_init"]["status"] == "error" {
        return refused(&model, &given);
    }
    let want: BTreeSet<_> = texts(stated, "matched_modules")?.into_iter().collect();
    let adapter = Adapter::read(fixture.dir().join("adapter"))?;
    let modules = adapter.modules().iter().map(AdapterModule::path);
    equal("modules of the file", &modules.collect(), &want)?;
    for config in [&given, adapter.config()] {
        let found = model.targets(config)?;
        let found = found.iter().map(|target| target.path.as_str());
        equal("targeted modules", &found.collect(), &want)?;
    }
    Ok(())
}

/// An error when PEFT attaches the adapter to the model: a target that there is not, or different tokens for tied modules.
pub(super) fn attach(fixture: &Fixture, operation: &Value) -> Outcome {
    only("the operation", operation, &["op", "on", "peft"])?;
    equal(
        "PEFT's outcome",
        &operation["peft"]["status"],
        &Value::from("error"),
    )?;
    equal(
        "PEFT's outcome",
        &fixture.json()["peft_init"]["status"],
        &Value::from("error"),
    )?;
    match text(&operation["peft"], "type")? {
        "NoMatchingPeftModuleError" => {
            let given = config(fixture, &fixture.json()["target_modules_given"])?;
            refused(&toy(fixture)?, &given)
        }
        "ValueError" => {
            // Refused with and without `ensure_weight_tying`: see F8.
            let model = ModelTables::of(&fixture.base(&Value::Null)?)?;
            for ensure in [true, false] {
                let config = lora(fixture, ensure)?;
                ensure!(
                    matches!(model.targets(&config), Err(Error::TiedTokens { .. })),
                    "different tokens of tied modules are accepted"
                );
            }
            Ok(())
        }
        other => Err(Failure::new(format!("PEFT's {other} is unknown"))),
    }
}

/// The modules that PEFT wrapped in a whole model, those with rows of their own and those tied to them.
pub(super) fn wrapped(fixture: &Fixture) -> Outcome {
    let model = ModelTables::of(&fixture.base(&Value::Null)?)?;
    let adapter = Adapter::read(fixture.dir().join("adapter"))?;
    let wrapped = fixture.json()["wrapped_modules"].as_object();
    let (mut own, mut tied) = (BTreeSet::new(), BTreeSet::new());
    for (path, how) in wrapped.ok_or("wrapped_modules is no object")? {
        only(path, how, &["tied", "base_layer"])?;
        if how["tied"] == true {
            tied.insert(path.clone());
        } else {
            own.insert(path.clone());
        }
    }
    let found = match model.targets(adapter.config()) {
        // F8: PEFT wraps both modules, over one table.
        Err(Error::TiedTokens { .. }) => {
            let modules = adapter.modules().iter().map(|module| module.path().to_owned());
            equal("modules of the file", &modules.collect(), &own)?;
            let shares = |path: &String| model.shares_input_embedding(path);
            ensure!(own.len() > 1 && own.iter().all(shares), "the tables are apart");
            return Ok(());
        }
        found => found?,
    };
    let paths = |part: fn(&TargetedTable) -> Vec<String>| found.iter().flat_map(part).collect();
    equal(
        "targeted modules",
        &paths(|target| vec![target.path.clone()]),
        &own,
    )?;
    equal("tied modules", &paths(|target| target.tied.clone()), &tied)
}

fn refused(model: &ModelTables, config: &AdapterConfig) -> Outcome {
    match model.targets(config) {
        Err(Error::NoTarget { .. }) => Ok(()),
        other => Err(Failure::new(format!(
            "the targets are {other:?}, expected that there is none"
        ))),
    }
}

/// A toy model: its modules, and the input embedding if it tells it.
fn toy(fixture: &Fixture) -> Result<ModelTables, Failure> {
    let modules = fixture.json()["modules"].as_array().ok_or("modules is no list")?;
    let paths = modules.iter().map(|module| text(module, "path"));
    let model = ModelTables::named(paths.collect::<Result<Vec<_>, _>>()?);
    let config = std::fs::read(fixture.base(&Value::Null)?.config_path())?;
    let config: Value = serde_json::from_slice(&config)?;
    Ok(match config["input_embeddings"].as_str() {
        Some(path) => model.with_input_embedding(path),
        None => model,
    })
}

/// The config that PEFT was given.
fn config(fixture: &Fixture, target_modules: &Value) -> Result<AdapterConfig, Failure> {
    let config = json!({
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": fixture.json()["token_indices"],
        "target_modules": target_modules,
    });
    Ok(AdapterConfig::from_json(config.to_string().as_bytes(), "config")?)
}

fn lora(fixture: &Fixture, ensure_weight_tying: bool) -> Result<AdapterConfig, Failure> {
    let config = json!({
        "peft_type": "LORA",
        "trainable_token_indices": fixture.json()["trainable_token_indices"],
        "ensure_weight_tying": ensure_weight_tying,
        "target_modules": fixture.json()["hyper"]["target_modules"],
    });
    Ok(AdapterConfig::from_json(config.to_string().as_bytes(), "config")?)
}

//! What PEFT wrote: adapters, merged checkpoints, tables of resized vocabularies.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use trainable_tokens_core::{EmbeddingSource, ErrorKind, TokenId, TokenRows};
use trainable_tokens_format::{
    Adapter, BaseCheck, Checkpoint, Error, Merge, Overwrite, SafetensorsFile, merge_checkpoint,
};

use super::compare::Tolerance;
use super::fixture::Fixture;
use super::value::{count, only, text, texts};
use crate::failure::{ensure, equal, refused, same};
use crate::world::overwritten;
use crate::{Failure, Outcome};

/// Every adapter of the case is what `case.json` says, and is written again byte for byte.
pub(super) fn adapters(fixture: &Fixture) -> Outcome {
    for stated in fixture.json()["adapters"].as_array().into_iter().flatten() {
        let dir = text(stated, "dir")?;
        written_again(fixture, dir, stated)
            .map_err(|failure| Failure::new(format!("{dir}: {}", failure.reason())))?;
    }
    Ok(())
}

fn written_again(fixture: &Fixture, dir: &str, stated: &Value) -> Outcome {
    let dir = fixture.dir().join(dir);
    let file = SafetensorsFile::open(dir.join("adapter_model.safetensors"))?;
    let keys = stated["keys"].as_object().ok_or("its keys are no object")?;
    equal(
        "tensors",
        &file.names().collect::<BTreeSet<_>>(),
        &keys.keys().map(String::as_str).collect(),
    )?;
    for (name, stated) in keys {
        let tensor = file.tensor(name)?;
        equal(
            name,
            &json!({ "dtype": format!("{:?}", tensor.dtype), "shape": tensor.shape }),
            stated,
        )?;
    }
    let adapter = Adapter::read(&dir)?;
    let home = tempfile::tempdir()?;
    let out = home.path().join("adapter");
    adapter.write(&out, Overwrite::Refuse)?;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let [got, want] = [&out, &dir].map(|dir| std::fs::read(dir.join(name)));
        ensure!(got? == want?, "{name} is written differently");
    }
    let config: Value = serde_json::from_str(&adapter.config().to_json())?;
    equal("adapter_config.json", &config, &stated["adapter_config"])?;
    for module in adapter.modules() {
        if fixture.has("delta.trained") && module.path() == fixture.first().owner {
            same("rows", module.rows(), &fixture.rows("delta.trained")?)?;
        }
    }
    Ok(())
}

/// The rows of a file are the recorded ones.
pub(super) fn roundtrip(fixture: &Fixture, operation: &Value) -> Outcome {
    only(
        "the operation",
        operation,
        &["op", "adapter", "expect", "atol", "rtol"],
    )?;
    only("what it expects", &operation["expect"], &["delta"])?;
    let [adapter] = &fixture.adapters(operation, fixture.first())?[..] else {
        return Err(Failure::new("it has not one adapter for the module"));
    };
    let want = fixture.rows(text(&operation["expect"], "delta")?)?;
    same("rows", &adapter.rows, &want)
}

/// A merged copy of the checkpoint has PEFT's tensors, bit for bit.
pub(super) fn merged_checkpoint(fixture: &Fixture, operation: &Value) -> Outcome {
    let known = ["op", "adapter", "base", "expect_dir", "note"];
    only("the operation", operation, &known)?;
    let adapter = Adapter::read(fixture.dir().join(text(operation, "adapter")?))?;
    let base = fixture.base(operation)?;
    let want = Checkpoint::open(fixture.dir().join(text(operation, "expect_dir")?))?;
    let home = tempfile::tempdir()?;
    let out = home.path().join("merged");
    merge_checkpoint(&base, &adapter.replacements(&base)?, &out, Overwrite::Refuse)?;
    let got = Checkpoint::open(&out)?;
    equal(
        "tensors",
        &got.names().collect::<Vec<_>>(),
        &want.names().collect(),
    )?;
    for name in want.names() {
        let [got, want] = [&got, &want].map(|checkpoint| checkpoint.tensor(name));
        let (got, want) = (got?, want?);
        ensure!(
            got.dtype == want.dtype && got.shape == want.shape && got.bytes == want.bytes,
            "tensor {name} differs"
        );
        // As in the base, so in the copy: shards keep their names.
        let [from, to] = [&base, &Checkpoint::open(&out)?].map(|at| {
            at.shard_of(name)
                .map(|path| path.file_name().map(ToOwned::to_owned))
        });
        equal("its file", &to?, &from?)?;
    }
    Ok(())
}

/// A weight of the model with what LoRA adds to it.
pub(super) fn lora_merge(fixture: &Fixture, operation: &Value) -> Outcome {
    let base = fixture.base(operation)?;
    let adapter = Adapter::read(fixture.dir().join("adapter"))?;
    let merge = match Merge::new(&base).with("default", &adapter) {
        // F8: rows that are refused say nothing about the other weights.
        Err(Error::TiedTokens { .. }) => Merge::new(&base).with("default", &adapter.without_tokens()?)?,
        merge => merge?,
    };
    let home = tempfile::tempdir()?;
    let out = home.path().join("merged");
    merge.write(&out, Overwrite::Refuse)?;
    let merged = Checkpoint::open(&out)?;
    let got = merged.tensor(&format!("{}.weight", text(operation, "module")?))?;
    let want = fixture.rows(text(operation, "expect")?)?;
    Tolerance::of(operation)?.check("weight", &got.to_rows()?, &want)
}

/// Which tensors a merge changes, as `case.json` tells of PEFT's.
pub(super) fn changed_tensors(fixture: &Fixture) -> Outcome {
    let stated = &fixture.json()["merged_checkpoint"];
    let known = [
        "same_keys_as_base",
        "only_in_base",
        "only_in_merged",
        "changed_tensors",
    ];
    only("merged_checkpoint", stated, &known)?;
    equal(
        "same_keys_as_base",
        &stated["same_keys_as_base"],
        &Value::from(true),
    )?;
    let adapter = Adapter::read(fixture.dir().join("adapter"))?;
    let replaced = adapter.replacements(&fixture.base(&Value::Null)?)?;
    let names: BTreeSet<_> = replaced.iter().map(|one| one.tensor.as_str()).collect();
    equal(
        "changed tensors",
        &names,
        &texts(stated, "changed_tensors")?.into_iter().collect(),
    )
}

/// Adapters for a vocabulary that grew: with whole tables (`save_embedding_layers`) and with rows alone.
pub(super) fn resized(fixture: &Fixture) -> Outcome {
    let json = fixture.json();
    let [old, new] = ["old_vocab", "new_vocab"].map(|name| count(json, name));
    let (old, new) = (old?, new?);
    let [base, resized] = ["base", "base_resized"].map(|dir| Checkpoint::open(fixture.dir().join(dir)));
    let (base, resized) = (base?, resized?);
    let module = fixture.first();
    let grown = fixture.rows("base_resized.embed")?;
    equal("the resized vocabulary", &grown.num_rows(), &new)?;
    same("the resized table", &module.table, &grown)?;
    equal(
        "the old vocabulary",
        &base.table(&module.tensor)?.vocab_size(),
        &old,
    )?;
    let untied = resized.contains("lm_head.weight");
    for stated in json["adapters"].as_array().into_iter().flatten() {
        let adapter = Adapter::read(fixture.dir().join(text(stated, "dir")?))?;
        let table = adapter.table(&module.path, &resized)?;
        same("the table over the resized base", &whole(&table)?, &grown)?;
        adapter.check_against(&resized, BaseCheck::Fits)?;
        // F14: on the base as it was, PEFT fails whatever the file holds.
        equal(
            "PEFT's outcome on the base as it was",
            &stated["load_not_resized"]["status"],
            &Value::from("error"),
        )?;
        let holds_table = adapter
            .extra_tensors()
            .any(|name| name.ends_with("base_layer.weight"));
        if holds_table {
            let table = whole(&adapter.table(&module.path, &base)?)?;
            same("the table over the base as it was", &table, &grown)?;
            for own in adapter.modules() {
                let merged = overwritten(&table, own.token_indices(), own.rows())?;
                same(
                    "the merged table over the base as it was",
                    &merged,
                    &fixture.rows("merged.embed")?,
                )?;
            }
        }
        let check = adapter.check_against(&base, BaseCheck::Fits);
        match (holds_table, untied) {
            // The rows alone leave a gap: a token was added that is not trained.
            (false, _) => refused("the base as it was", check, ErrorKind::TokenOutOfRange)?,
            // PEFT loses the resized head of an untied model.
            (true, true) => refused("the base as it was", check, ErrorKind::Shape)?,
            (true, false) => check?,
        }
    }
    Ok(())
}

fn whole(table: &impl EmbeddingSource<Error: std::fmt::Display>) -> Result<TokenRows, Failure> {
    let ids: Vec<TokenId> = (0u32..).take(table.vocab_size()).map(TokenId).collect();
    Ok(table.read_rows(&ids)?)
}

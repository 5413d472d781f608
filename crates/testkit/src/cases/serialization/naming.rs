//! Checkpoints of a base model alone, and adapters whose modules have its prefix or not.

use std::fs;

use serde_json::json;
use tempfile::TempDir;
use trainable_tokens_core::{DType, ErrorKind, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, BaseCheck, Checkpoint, CheckpointDiff, Extract, ModelTables, Overwrite,
    TokenIndices, merge_checkpoint,
};

use super::checkpoint_of;
use crate::failure::{ensure, equal, refused, same};
use crate::world::noise;
use crate::{Failure, Harness, Outcome};

/// A checkpoint of a class and a family.
fn model_of(
    class: &str,
    family: &str,
    tied: Option<bool>,
    tensors: &[(&str, &TokenRows)],
) -> Result<(TempDir, trainable_tokens_format::Result<Checkpoint>), Failure> {
    let (home, dir) = checkpoint_of(tensors)?;
    let config =
        json!({"architectures": [class], "model_type": family, "tie_word_embeddings": tied, "vocab_size": 7});
    fs::write(dir.join("config.json"), config.to_string())?;
    Ok((home, Checkpoint::open(dir)))
}

/// A causal language model has the modules of its class, however it is stored; an encoder those that are stored.
pub fn modules_are_named_as_transformers_names_them<H: Harness>() -> Outcome {
    let table = noise(1, H::DTYPE, 7, 2);
    for (class, family, tied, stored, path, others) in [
        (
            "GPT2LMHeadModel",
            "gpt2",
            None,
            "wte",
            "transformer.wte",
            &["lm_head"][..],
        ),
        ("GPT2Model", "gpt2", Some(false), "wte", "transformer.wte", &[]),
        (
            "LlamaModel",
            "llama",
            Some(true),
            "embed_tokens",
            "model.embed_tokens",
            &["lm_head"],
        ),
        (
            "LlamaForCausalLM",
            "llama",
            None,
            "embed_tokens",
            "model.embed_tokens",
            &[],
        ),
        (
            "Gemma2Model",
            "gemma2",
            None,
            "embed_tokens",
            "model.embed_tokens",
            &["lm_head"],
        ),
    ] {
        let name = format!("{stored}.weight");
        let (_home, model) = model_of(class, family, tied, &[(&name, &table), ("norm.weight", &table)])?;
        let model = model?;
        let tables = ModelTables::of(&model)?;
        equal(family, &tables.input_embedding(), &Some(path))?;
        let others: Vec<_> = others.iter().map(|&other| other.to_owned()).collect();
        equal(family, &tables.tied(), &others.as_slice())?;
        let in_model = format!("{path}.weight");
        for either in [&name, &in_model] {
            equal(either, &model.stored_name(either), &Some(name.as_str()))?;
            equal(either, &model.table(either)?.name(), &name.as_str())?;
        }
        equal("the module", &model.module_name(stored).as_ref(), &path)?;
        equal(
            "the head",
            &model.module_name("lm_head.weight").as_ref(),
            &"lm_head.weight",
        )?;
        // Where both names are stored, nothing tells which counts.
        let both = [(name.as_str(), &table), (&in_model, &table)];
        let (_home, both) = model_of(class, family, tied, &both)?;
        refused("a module stored twice", both, ErrorKind::Unsupported)?;
    }
    let word = "embeddings.word_embeddings";
    for path in [word.to_owned(), format!("bert.{word}")] {
        let name = format!("{path}.weight");
        let (_home, model) = model_of("BertModel", "bert", None, &[(&name, &table)])?;
        equal("an encoder", &model?.module_name(&name).as_ref(), &name.as_str())?;
    }
    // What a class has beside its base model keeps its name.
    let tensors = [("transformer.wte.weight", &table), ("extra.weight", &table)];
    let (_home, model) = model_of("GPT2LMHeadModel", "gpt2", None, &tensors)?;
    equal(
        "another part",
        &model?.module_name("extra.weight").as_ref(),
        &"extra.weight",
    )?;
    // Of other families, names are what they are.
    let (_home, other) = model_of("OtherForCausalLM", "other", None, &[("wte.weight", &table)])?;
    ensure!(!other?.contains("transformer.wte.weight"), "a name is made up");
    Ok(())
}

/// An adapter names modules with the prefix or, made for the base model alone, without: never both ways.
pub fn adapters_name_modules_with_the_prefix_or_without<H: Harness>() -> Outcome {
    let (table, rows) = (noise(1, H::DTYPE, 7, 2), noise(2, DType::F32, 2, 2));
    let tokens = TokenSet::new([5, 2], 7)?;
    let adapter = |path: &str| Adapter::builder(path, &tokens, rows.clone()).build();
    for stored in ["wte.weight", "transformer.wte.weight"] {
        let (home, base) = model_of("GPT2LMHeadModel", "gpt2", None, &[(stored, &table)])?;
        let base = base?;
        let mut merged = Vec::new();
        for path in ["wte", "transformer.wte"] {
            let adapter = adapter(path)?;
            adapter.check_against(&base, BaseCheck::SameTable)?;
            let replacements = adapter.replacements(&base)?;
            equal("the tensor", &replacements[0].tensor.as_str(), &stored)?;
            let out = home.path().join(path);
            merge_checkpoint(&base, &replacements, &out, Overwrite::Refuse)?;
            merged.push(Checkpoint::open(out)?);
        }
        let [short, long] = &merged[..] else {
            return Err("the case is wrong".into());
        };
        ensure!(
            CheckpointDiff::between(short, long)?.is_empty(),
            "they do not mean the same"
        );
        equal("stored", &short.names().collect::<Vec<_>>(), &vec![stored])?;
        let extracted = Extract::new(&base, short).adapter()?;
        let module = &extracted.modules()[0];
        equal("the path", &module.path(), &"transformer.wte")?;
        equal("tied", &module.tied_paths(), &["lm_head".to_owned()].as_slice())?;
    }
    // What is stored with the prefix and what is stored without are compared module by module.
    let [(_one, long), (_other, short)] = [
        model_of(
            "GPT2LMHeadModel",
            "gpt2",
            None,
            &[("transformer.wte.weight", &table)],
        )?,
        model_of("GPT2LMHeadModel", "gpt2", None, &[("wte.weight", &table)])?,
    ];
    let (long, short) = (long?, short?);
    ensure!(CheckpointDiff::between(&long, &short)?.is_empty(), "they differ");
    ensure!(CheckpointDiff::between(&short, &long)?.is_empty(), "they differ");

    let ids = TokenIndices::ByModule([("wte".to_owned(), vec![5, 2]), ("wpe".to_owned(), vec![1])].into());
    let mixed = Adapter::builder("wte", &tokens, rows.clone())
        .module_of(
            "transformer.wpe",
            &TokenSet::new([1], 7)?,
            noise(3, DType::F32, 1, 2),
        )
        .lora(AdapterConfig::lora(&ids)?)
        .build()?;
    let tensors = [("wte.weight", &table), ("wpe.weight", &table)];
    let (_home, base) = model_of("GPT2LMHeadModel", "gpt2", None, &tensors)?;
    let base = base?;
    refused(
        "both",
        mixed.check_against(&base, BaseCheck::Fits),
        ErrorKind::File,
    )?;
    refused("both", mixed.replacements(&base).map(|_| ()), ErrorKind::File)?;
    same("the base", &base.tensor("wte.weight")?.to_rows()?, &table)
}

//! Rows beside LoRA's weights.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::json;
use trainable_tokens_core::{ErrorKind, TokenSet};
use trainable_tokens_format::{Adapter, AdapterConfig, PeftType, TokenIndices};

use super::{Files, HEAD, KEY, MODULE, key, safetensors_of, unframed};
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, lookup, noise, select};
use crate::{Failure, Harness, Layer, Outcome};

/// The name of the rows of the module at `path` in a LoRA adapter.
fn lora_key(path: &str) -> String {
    format!("{}{path}.token_adapter{}", KEY.0, KEY.1)
}

fn none() -> TokenIndices {
    TokenIndices::ByModule(BTreeMap::new())
}

/// A config of these token ids alone.
fn config(ids: &str) -> trainable_tokens_format::Result<AdapterConfig> {
    let text = format!(r#"{{"peft_type": "LORA", "trainable_token_indices": {ids}}}"#);
    AdapterConfig::from_json(text.as_bytes(), "adapter_config.json")
}

/// A layer's rows are saved beside LoRA's weights under LoRA's name, once for tied modules, and give the rows back in
/// slot order; the name of the other kind is refused.
pub fn lora_keeps_the_rows_beside_its_weights<H: Harness>() -> Outcome {
    const WEIGHT: &str = "base_model.model.model.layers.0.q_proj.lora_A.weight";
    for_all(|world| {
        let layer = world.trained::<H>()?;
        let adapter = Adapter::builder(MODULE, layer.tokens(), layer.rows()?)
            .tied(HEAD)
            .lora(AdapterConfig::lora(&none())?)
            .extra_tensor(WEIGHT, Dtype::F32, [1, 2], vec![7; 8])
            .build()?;
        let files = Files::of(&adapter)?;
        let (header, data) = unframed(&files.rows)?;
        ensure!(
            header.contains(&format!("\"{}\":", lora_key(MODULE))),
            "no rows in {header}"
        );
        ensure!(
            !header.contains(HEAD),
            "PEFT saves tied modules once, but there is {header}"
        );
        let read = files.read()??;
        equal("the kind", &read.config().peft_type(), &PeftType::Lora)?;
        equal(
            "the config's ids",
            read.config().token_indices(),
            &TokenIndices::List(world.tokens.clone()),
        )?;
        equal("the weight", &read.extra_tensor(WEIGHT)?.bytes, &&[7; 8][..])?;
        equal("the file written again", &read.to_safetensors()?, &files.rows)?;
        let module = read.module(MODULE).ok_or("the file has no rows of the module")?;
        let source = H::source(&world.table::<H>())?;
        let loaded = Layer::<H>::with_rows(source, module.token_set(world.v)?, module.rows())?;
        let want = select(&world.dense::<H>()?, &world.ids)?;
        same("rows", &lookup::<H>(&loaded, &world.ids)?, &want)?;

        for (name, damaged) in [
            ("the name of the other kind", header.replace(".token_adapter", "")),
            (
                "an adapter's name",
                header.replace("_delta\"", "_delta.default\""),
            ),
        ] {
            let result = files.with_rows(super::framed(&damaged, data)).read()?;
            let message = result
                .as_ref()
                .map_or_else(ToString::to_string, |_| String::new());
            refused(name, result, ErrorKind::File)?;
            ensure!(
                message.contains(&lora_key(MODULE)),
                "{name}: the right one is not in: {message}"
            );
        }
        Ok(())
    })
}

/// Modules may have different tokens: each its own ids, rows and metadata.
pub fn lora_tells_the_tokens_of_each_module<H: Harness>() -> Outcome {
    let world = World::fixed(300, 2, &[277, 5, 0], &[]);
    let (rows, head) = (world.rows::<H>(), noise(9, H::DTYPE, 1, 2));
    let adapter = Adapter::builder(MODULE, &world.token_set()?, rows.clone())
        .tokens(["a", "b", "c"].map(String::from).to_vec())
        .module_of(HEAD, &TokenSet::new([7], 200)?, head.clone())
        .lora(AdapterConfig::lora(&none())?)
        .build()?;
    let files = Files::of(&adapter)?;
    let (header, data) = unframed(&files.rows)?;
    let release = env!("CARGO_PKG_VERSION");
    let want = format!(
        "{{\"__metadata__\":{{\"format\":\"pt\",\"trainable_tokens.embedding_dim\":\"2\",\
         \"trainable_tokens.format_version\":\"1\",\"trainable_tokens.library_version\":\"{release}\",\
         \"trainable_tokens.modules\":\"{{\\\"lm_head\\\":{{\\\"token_indices\\\":[7],\\\"vocab_size\\\":200}},\
         \\\"{MODULE}\\\":{{\\\"token_indices\\\":[277,5,0],\\\"tokens\\\":[\\\"a\\\",\\\"b\\\",\\\"c\\\"],\
         \\\"vocab_size\\\":300}}}}\"}},"
    );
    ensure!(header.starts_with(&want), "the metadata are {header}, not {want}");
    let read = files.read()??;
    for (path, ids, rows) in [(MODULE, &world.tokens[..], &rows), (HEAD, &[7][..], &head)] {
        let module = read.module(path).ok_or("the file has no rows of the module")?;
        equal("the ids", &module.token_indices(), &ids)?;
        same(path, module.rows(), rows)?;
        equal(
            "the metadata",
            &read.module_metadata(path).token_indices,
            &Some(ids.to_vec()),
        )?;
    }
    equal("the file written again", &read.to_safetensors()?, &files.rows)?;
    for (have, damaged) in [
        ("[277,5,0]", "[5,277,0]"),
        ("\\\"vocab_size\\\":200", "\\\"vocab_size\\\":7"),
        ("[\\\"a\\\",", "["),
        ("{\\\"lm_head\\\"", "{\\\"ln_head\\\""),
        ("[7],", "[7],\\\"token_indices\\\":[7],"),
    ] {
        let damaged = header.replace(have, damaged);
        ensure!(damaged != header, "the case is wrong");
        refused(
            have,
            files.with_rows(super::framed(&damaged, data)).read()?,
            ErrorKind::File,
        )?;
    }
    refused(
        "two sets of tokens without LoRA",
        Adapter::builder(MODULE, &world.token_set()?, rows)
            .module_of(HEAD, &TokenSet::new([7], 200)?, head)
            .build(),
        ErrorKind::File,
    )
}

/// The ids by module, and the rows of the file, must be of the same modules and of the same number.
pub fn ids_by_module_and_rows_must_fit<H: Harness>() -> Outcome {
    let (embedding, head) = (noise(1, H::DTYPE, 3, 2), noise(2, H::DTYPE, 1, 2));
    let [first, second] = [MODULE, HEAD].map(lora_key);
    let both = safetensors_of(&[(&first, &embedding), (&second, &head)])?;
    let one = safetensors_of(&[(&first, &embedding)])?;
    let read = |rows: &[u8], ids: &str| {
        let config = config(ids)?.to_json();
        let rows = rows.to_vec();
        Files { config, rows }.read()
    };
    for (rows, ids) in [
        (&both, r#"{"embed_tokens": [5, 1, 0], "lm_head": [7]}"#),
        (
            &both,
            r#"{"model.embed_tokens": [5, 1, 0], "embed_tokens": [5, 1, 0], "lm_head": [7]}"#,
        ),
        (&one, r#"{"embed_tokens": [5, 1, 0]}"#),
        (&one, r#"{"embed_tokens": [5, 1, 0], "lm_head": [5, 1, 0]}"#),
        (&one, "[5, 1, 0]"),
    ] {
        read(rows, ids)?.map_err(|error| format!("{ids}: {error}"))?;
    }
    for (rows, ids, kind) in [
        (&both, "[5, 1, 0]", ErrorKind::Shape),
        (
            &both,
            r#"{"embed_tokens": [5, 1, 0], "lm_head": [7, 8]}"#,
            ErrorKind::Shape,
        ),
        (&both, r#"{"embed_tokens": [5, 1, 0]}"#, ErrorKind::Shape),
        (
            &both,
            r#"{"embed_tokens": [5, 1, 0], "lm_head": [7], "wte": [1]}"#,
            ErrorKind::File,
        ),
        (
            &both,
            r#"{"embed_tokens": [5, 1, 0], "head": [7]}"#,
            ErrorKind::File,
        ),
        (
            &one,
            r#"{"embed_tokens": [5, 1, 0], "lm_head": [1, 5, 0]}"#,
            ErrorKind::File,
        ),
        (
            &one,
            r#"{"model.embed_tokens": [5, 1, 0], "embed_tokens": [5, 0, 1]}"#,
            ErrorKind::File,
        ),
        (&one, r#"{"okens": [5, 1, 0]}"#, ErrorKind::File),
        (&one, "null", ErrorKind::Shape),
        (&one, "{}", ErrorKind::Shape),
    ] {
        refused(ids, read(rows, ids)?, kind)?;
    }
    let bare = safetensors_of(&[])?;
    for ids in ["null", "{}"] {
        equal(
            "modules",
            &read(&bare, ids)?.map_err(Failure::from)?.modules().len(),
            &0,
        )?;
    }
    refused("no rows", read(&bare, "[]")?, ErrorKind::File)?;
    // The name of the other kind.
    let bare = safetensors_of(&[(&key(MODULE), &embedding)])?;
    refused("the other name", read(&bare, "[5, 1, 0]")?, ErrorKind::File)
}

/// A new config has every field of PEFT's `LoraConfig`; what is known is checked as strictly as elsewhere.
pub fn a_lora_config_is_that_of_peft<H: Harness>() -> Outcome {
    let ids = TokenIndices::ByModule(BTreeMap::from([("lm_head".to_owned(), vec![7, 148])]));
    let want = include_str!("lora_config.json");
    equal(
        "a new config",
        &AdapterConfig::lora(&ids)?.to_json().as_str(),
        &want.trim_end(),
    )?;
    let other = AdapterConfig::lora(&none())?.with_field("r", &json!(16))?;
    equal(
        "the ids",
        &other.field("trainable_token_indices"),
        &Some(json!(null)),
    )?;
    equal("another field", &other.field("r"), &Some(json!(16)))?;
    for bad in [
        "true",
        "7",
        "\"7\"",
        "[7, 7]",
        "[-1]",
        "[1.0]",
        "[true]",
        "[4294967296]",
        "{\"a\": 7}",
        "{\"a\": null}",
        "{\"\": [7]}",
        "{\"a\": [7, 7]}",
        "{\"a\": [1.0]}",
        "{\"a\": [7], \"a\": [7]}",
    ] {
        refused(bad, config(bad), ErrorKind::File)?;
    }
    let with = |name: &str, value: serde_json::Value| AdapterConfig::lora(&ids)?.with_field(name, &value);
    refused(
        "a whole module",
        with("modules_to_save", json!(["lm_head"])),
        ErrorKind::File,
    )?;
    with("modules_to_save", json!(["other"]))?;
    for value in [json!(null), json!(1), json!("true")] {
        refused(
            "ensure_weight_tying",
            with("ensure_weight_tying", value),
            ErrorKind::File,
        )?;
    }
    Ok(())
}

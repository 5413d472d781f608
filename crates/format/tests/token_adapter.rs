//! Rows beside LoRA's weights: PEFT's `LoraConfig` with `trainable_token_indices`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::fixtures;
use safetensors::Dtype;
use serde_json::json;
use trainable_tokens_core::{BackendError as _, DType, ErrorKind, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, AdapterModule, BaseCheck, Checkpoint, Error, ModuleMetadata, PeftType, Result,
    SafetensorsFile, TokenIndices, digest,
};

const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

fn case(name: &str) -> Adapter {
    Adapter::read(fixtures().join(name).join("adapter")).unwrap()
}

fn base(name: &str) -> Checkpoint {
    Checkpoint::open(fixtures().join(name).join("base")).unwrap()
}

fn by_module(lists: &[(&str, &[u32])]) -> TokenIndices {
    let lists = lists.iter().map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
    TokenIndices::ByModule(lists.collect())
}

/// `num_rows` rows that differ from those of another `start`.
fn rows(start: u8, num_rows: usize) -> TokenRows {
    let values = (0..num_rows * 4).map(|at| f32::from(start) + f32::from(u8::try_from(at).unwrap()));
    TokenRows::new(values.collect(), num_rows, 4).unwrap()
}

fn set(ids: &[u32]) -> TokenSet {
    TokenSet::new(ids.iter().copied(), 300).unwrap()
}

/// Writes an adapter and reads it back.
fn round_trip(adapter: &Adapter) -> Adapter {
    let dir = tempfile::tempdir().unwrap();
    adapter.write_into(dir.path()).unwrap();
    let back = Adapter::read(dir.path()).unwrap();
    assert_eq!(back.modules(), adapter.modules());
    assert_eq!(back.config(), adapter.config());
    assert_eq!(back.metadata(), adapter.metadata());
    assert_eq!(back.to_safetensors().unwrap(), adapter.to_safetensors().unwrap());
    back
}

/// Reads the adapter with its config's token ids replaced.
fn with_ids(adapter: &Adapter, ids: &serde_json::Value) -> Result<Adapter> {
    let config = adapter.config().with_field("trainable_token_indices", ids)?;
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", adapter.to_safetensors()?)?;
    Adapter::from_parts(config, &file)
}

#[test]
fn a_list_is_for_the_input_embedding() {
    for name in ["lora_list_untied", "lora_list_tied"] {
        let adapter = case(name);
        assert_eq!(adapter.config().peft_type(), PeftType::Lora);
        assert_eq!(
            adapter.config().token_indices(),
            &TokenIndices::List(vec![149, 3, 40])
        );
        let [module] = adapter.modules() else {
            panic!("{:?}", adapter.modules())
        };
        assert_eq!(module.path(), EMBEDDING);
        assert_eq!(module.token_indices(), [149, 3, 40]);
        assert!(module.tied_paths().is_empty());
        adapter.check_against(&base(name), BaseCheck::SameTable).unwrap();
    }
}

#[test]
fn every_module_has_tokens_of_its_own() {
    let adapter = case("lora_dict_untied");
    let modules = adapter
        .modules()
        .iter()
        .map(|module| (module.path(), module.token_indices()));
    assert_eq!(
        modules.collect::<BTreeMap<_, _>>(),
        BTreeMap::from([(HEAD, &[7, 148][..]), (EMBEDDING, &[149, 3, 40])])
    );
    assert_eq!(adapter.config().token_indices().common(), None);
    let base = base("lora_dict_untied");
    adapter.check_against(&base, BaseCheck::SameTable).unwrap();
    let replaced = adapter.replacements(&base).unwrap();
    let replaced = replaced.iter().map(|one| (one.tensor.as_str(), one.ids.len()));
    assert_eq!(
        replaced.collect::<Vec<_>>(),
        [("lm_head.weight", 2), ("model.embed_tokens.weight", 3)]
    );
}

/// PEFT trains two sets of rows over the one matrix and merges both into it: its logits change by 1.57.
#[test]
fn f8_different_tokens_of_a_tied_model_are_refused() {
    let adapter = case("lora_dict_tied_different");
    assert_eq!(adapter.modules().len(), 2);
    let base = base("lora_dict_tied_different");
    let error = adapter.check_against(&base, BaseCheck::Fits).unwrap_err();
    let Error::TiedTokens { first, second, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!([first.as_str(), second], [EMBEDDING, HEAD]);
    assert!(adapter.replacements(&base).is_err());
    let same = case("lora_dict_tied_same");
    same.check_against(&base, BaseCheck::SameTable).unwrap();
    assert_eq!(
        same.modules().iter().map(AdapterModule::path).collect::<Vec<_>>(),
        [EMBEDDING]
    );
}

#[test]
fn lora_weights_are_kept_and_readable() {
    let adapter = case("lora_list_untied");
    let names: Vec<_> = adapter.extra_tensors().collect();
    assert!(
        names.len() >= 4 && names.iter().all(|name| name.contains(".lora_")),
        "{names:?}"
    );
    let first = adapter.extra_tensor(names[0]).unwrap();
    assert_eq!(first.dtype, Dtype::F32);
    assert_eq!(first.bytes.len(), first.shape.iter().product::<usize>() * 4);
    assert!(adapter.extra_tensor("lora_A").is_err());
    assert_eq!(adapter.config().field("r"), Some(json!(4)));
    assert_eq!(adapter.config().field("lora_dropout"), Some(json!(0.0)));
}

#[test]
fn the_key_of_the_other_kind_is_named() {
    let bare =
        SafetensorsFile::open(fixtures().join("llama_untied/adapter/adapter_model.safetensors")).unwrap();
    let lora =
        SafetensorsFile::open(fixtures().join("lora_list_untied/adapter/adapter_model.safetensors")).unwrap();
    for (config, file, key) in [
        (
            case("lora_list_untied"),
            bare,
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
        (
            case("llama_untied"),
            lora,
            "base_model.model.model.embed_tokens.trainable_tokens_delta",
        ),
    ] {
        let error = Adapter::from_parts(config.config().clone(), &file).unwrap_err();
        let Error::TensorKey { expected, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(expected, key);
    }
}

#[test]
fn ids_and_rows_must_fit() {
    let untied = case("lora_dict_untied");
    for (ids, message) in [
        (json!([149, 3, 40]), "[3, D]"),
        (json!({"embed_tokens": [149, 3, 40]}), "[3, D]"),
        (json!({"embed_tokens": [149, 3, 40], "lm_head": [7]}), "[1, D]"),
        (
            json!({"embed_tokens": [149, 3, 40], "lm_head": [7, 148], "wte": [1]}),
            "\"base_model.model.wte.token_adapter.trainable_tokens_delta\"",
        ),
        (
            json!({"embed_tokens": [149, 3, 40], "model.embed_tokens": [149, 40, 3], "lm_head": [7, 148]}),
            "\"embed_tokens\" and \"model.embed_tokens\" both mean module \"model.embed_tokens\"",
        ),
        (json!({"okens": [149, 3, 40], "lm_head": [7, 148]}), "okens"),
        (json!(null), "trainable_token_indices"),
    ] {
        let error = with_ids(&untied, &ids).unwrap_err();
        assert!(error.to_string().contains(message), "{ids}: {error}");
    }
    // Twice the same, by path and by name.
    let ids = json!({"embed_tokens": [149, 3, 40], "model.embed_tokens": [149, 3, 40], "lm_head": [7, 148]});
    with_ids(&untied, &ids).unwrap();
    // PEFT saves tied modules with the same ids once, so a name may be without rows; but it needs these ids in order.
    let tied = case("lora_dict_tied_same");
    with_ids(
        &tied,
        &json!({"embed_tokens": [149, 3, 40], "decoder": [149, 3, 40]}),
    )
    .unwrap();
    assert!(
        with_ids(
            &tied,
            &json!({"embed_tokens": [149, 3, 40], "lm_head": [3, 149, 40]})
        )
        .is_err()
    );
}

/// PEFT compares the ends of paths without a dot: `emb` also wraps `pos_emb`.
#[test]
fn f15_names_match_after_a_dot() {
    let config = AdapterConfig::lora(&by_module(&[("emb", &[1])])).unwrap();
    let adapter = Adapter::builder("enc.emb", &set(&[1]), rows(1, 1)).lora(config.clone());
    adapter.build().unwrap();
    let error = Adapter::builder("pos_emb", &set(&[1]), rows(1, 1))
        .lora(config)
        .build()
        .unwrap_err();
    assert!(
        error.to_string().contains("\"pos_emb\" is not among them"),
        "{error}"
    );
}

#[test]
fn token_ids_of_lora_are_as_strict() {
    let read = |ids: &str| {
        let text = format!(r#"{{"peft_type": "LORA", "trainable_token_indices": {ids}}}"#);
        AdapterConfig::from_json(text.as_bytes(), "c.json")
    };
    for bad in [
        "true",
        "7",
        "\"7\"",
        "{\"a\": 7}",
        "{\"a\": null}",
        "{\"\": [7]}",
        "[[7]]",
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
    for id in ["-1", "20.0", "true", "null", "\"20\"", "4294967296", "7"] {
        for (ids, place) in [
            (format!("[3, 7, {id}]"), "trainable_token_indices[2]"),
            (
                format!("{{\"b.c\": [1], \"a\": [7, {id}]}}"),
                "trainable_token_indices[\"a\"][1]",
            ),
        ] {
            let error = read(&ids).unwrap_err().to_string();
            assert!(error.contains(place), "{ids}: {error}");
        }
    }
    assert!(read(r#"{"a": [1, 2], "b": [1, 2]}"#).is_ok());
    let saved = r#"{"peft_type": "LORA", "trainable_token_indices": {"lm_head": [1]}, "modules_to_save": ["lm_head"]}"#;
    let error = AdapterConfig::from_json(saved.as_bytes(), "c.json").unwrap_err();
    assert!(error.to_string().contains("modules_to_save"), "{error}");
    for (field, bad) in [("ensure_weight_tying", json!(1)), ("inference_mode", json!(null))] {
        let config = AdapterConfig::lora(&TokenIndices::List(vec![1])).unwrap();
        assert!(config.with_field(field, &bad).is_err(), "{field}");
    }
}

#[test]
fn a_new_config_is_that_of_peft() {
    let theirs = case("lora_dict_untied");
    let ids = by_module(&[("lm_head", &[7, 148]), ("embed_tokens", &[149, 3, 40])]);
    let mut ours = AdapterConfig::lora(&ids).unwrap();
    for (name, value) in [
        ("r", json!(4)),
        ("base_model_name_or_path", json!("base")),
        ("task_type", json!(null)),
        ("target_modules", json!(["v_proj", "q_proj"])),
        ("auto_mapping", json!(theirs.config().auto_mapping())),
    ] {
        ours = ours.with_field(name, &value).unwrap();
    }
    assert_eq!(ours.to_json(), theirs.config().to_json());
}

#[test]
fn a_built_adapter_is_that_of_peft() {
    for name in ["lora_dict_untied", "lora_list_tied", "lora_dict_tied_same"] {
        let dir = fixtures().join(name).join("adapter");
        let theirs = Adapter::read(&dir).unwrap();
        let mut modules = theirs.modules().iter();
        let first = modules.next().unwrap();
        let tokens = |module: &AdapterModule| module.token_set(150).unwrap();
        let mut builder = Adapter::builder(first.path(), &tokens(first), first.rows().clone())
            .lora(theirs.config().clone())
            .without_metadata();
        for module in modules {
            builder = builder.module_of(module.path(), &tokens(module), module.rows().clone());
        }
        for name in theirs.extra_tensors() {
            let tensor = theirs.extra_tensor(name).unwrap();
            builder = builder.extra_tensor(name, tensor.dtype, tensor.shape, tensor.bytes.to_vec());
        }
        let ours = builder.build().unwrap();
        let bytes = |file: &str| fs::read(dir.join(file)).unwrap();
        assert_eq!(
            ours.config().to_json().as_bytes(),
            bytes("adapter_config.json"),
            "{name}"
        );
        assert_eq!(
            ours.to_safetensors().unwrap(),
            bytes("adapter_model.safetensors"),
            "{name}"
        );
    }
}

#[test]
fn the_builder_spells_the_ids() {
    let config = || AdapterConfig::lora(&by_module(&[])).unwrap();
    let one = Adapter::builder(EMBEDDING, &set(&[5, 1]), rows(1, 2))
        .tied(HEAD)
        .lora(config());
    let one = round_trip(&one.build().unwrap());
    assert_eq!(one.config().field("trainable_token_indices"), Some(json!([5, 1])));
    assert!(
        one.modules()[0].tied_paths().is_empty(),
        "PEFT saves one copy with LoRA"
    );
    let two = Adapter::builder(EMBEDDING, &set(&[5, 1]), rows(1, 2)).module_of(HEAD, &set(&[9]), rows(7, 1));
    let two = round_trip(&two.lora(config()).build().unwrap());
    assert_eq!(
        two.config().field("trainable_token_indices"),
        Some(json!({"embed_tokens": [5, 1], "lm_head": [9]}))
    );
    let alike =
        Adapter::builder("enc.emb", &set(&[5]), rows(1, 1)).module_of("dec.emb", &set(&[9]), rows(7, 1));
    let alike = round_trip(&alike.lora(config()).build().unwrap());
    assert_eq!(
        alike.config().field("trainable_token_indices"),
        Some(json!({"enc.emb": [5], "dec.emb": [9]}))
    );
}

#[test]
fn what_does_not_fit_together_is_not_built() {
    let lora = |ids: &TokenIndices| AdapterConfig::lora(ids).unwrap();
    let builder = || Adapter::builder(EMBEDDING, &set(&[5, 1]), rows(1, 2));
    let refused = |builder: trainable_tokens_format::AdapterBuilder| builder.build().unwrap_err().to_string();
    assert!(refused(builder().lora(lora(&TokenIndices::List(vec![1, 5])))).contains("is not the token ids"));
    assert!(refused(builder().lora(lora(&by_module(&[("wte", &[5, 1])])))).contains("not among them"));
    let standalone = AdapterConfig::new(&[5, 1], &["embed_tokens"].into()).unwrap();
    assert!(refused(builder().lora(standalone)).contains("peft_type"));
    // One list cannot tell two sets.
    assert!(refused(builder().module_of(HEAD, &set(&[9]), rows(1, 1))).contains("token_indices"));
    for name in [
        "base_model.model.wte.token_adapter.trainable_tokens_delta",
        "base_model.model.wte.trainable_tokens_delta",
    ] {
        let extra = builder()
            .lora(lora(&by_module(&[])))
            .extra_tensor(name, Dtype::F32, [1], vec![0; 4]);
        assert!(refused(extra).contains(name));
    }
    let short = builder()
        .lora(lora(&by_module(&[])))
        .extra_tensor("x", Dtype::F32, [2], vec![0; 4]);
    assert!(refused(short).contains("\"x\""));
    let twice = builder().extra_tensor("x", Dtype::F32, [1], vec![0; 4]);
    assert!(refused(twice.extra_tensor("x", Dtype::F32, [1], vec![1; 4])).contains("\"x\""));
}

#[test]
fn facts_that_differ_stand_by_module() {
    let bases = ["embed_tokens", "lm_head"].map(|at| {
        let base = base("lora_dict_untied");
        let name = if at == HEAD {
            "lm_head.weight".to_owned()
        } else {
            format!("model.{at}.weight")
        };
        digest(&base.table(&name).unwrap()).unwrap()
    });
    let adapter = Adapter::builder(EMBEDDING, &set(&[5, 1]), rows(1, 2))
        .tokens(vec!["a".into(), "b".into()])
        .base(bases[0], DType::F32)
        .module_of(HEAD, &TokenSet::new([9], 200).unwrap(), rows(7, 1))
        .tokens(vec!["c".into()])
        .base(bases[1], DType::F32)
        .lora(AdapterConfig::lora(&by_module(&[])).unwrap())
        .build()
        .unwrap();
    let adapter = round_trip(&adapter);
    let metadata = adapter.metadata();
    assert_eq!(
        (metadata.vocab_size, &metadata.token_indices, &metadata.tokens),
        (None, &None, &None)
    );
    assert_eq!(
        (metadata.embedding_dim, metadata.base_dtype),
        (Some(4), Some(DType::F32))
    );
    // As ever, that of the first by name.
    assert_eq!(metadata.base_digest, Some(bases[1]));
    let head = adapter.module_metadata(HEAD);
    assert_eq!((head.vocab_size, head.token_indices), (Some(200), Some(vec![9])));
    assert_eq!(
        (head.tokens, head.base_digest),
        (Some(vec!["c".to_owned()]), Some(bases[1]))
    );
    let embedding = adapter.module_metadata(EMBEDDING);
    assert_eq!(
        (embedding.vocab_size, embedding.base_digest),
        (Some(300), Some(bases[0]))
    );

    let changes: [fn(&mut ModuleMetadata); 4] = [
        |module| module.vocab_size = Some(9),
        |module| module.token_indices = Some(vec![5]),
        |module| module.tokens = Some(vec![]),
        |module| module.embedding_dim = Some(5),
    ];
    for change in changes {
        let mut metadata = metadata.clone();
        change(metadata.modules.get_mut(HEAD).unwrap());
        let error = adapter.clone().with_metadata(metadata).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("trainable_tokens.modules[\"lm_head\"]."),
            "{error}"
        );
    }
    let mut metadata = metadata.clone();
    metadata
        .modules
        .insert("other".to_owned(), metadata.modules[HEAD].clone());
    assert!(adapter.clone().with_metadata(metadata).is_err());
}

#[test]
fn an_adapter_without_tokens_is_a_plain_one() {
    let plain = case("lora_list_untied").without_tokens().unwrap();
    let plain = round_trip(&plain);
    assert!(plain.modules().is_empty());
    assert_eq!(plain.config().field("trainable_token_indices"), Some(json!(null)));
    assert!(plain.extra_tensors().all(|name| name.contains(".lora_")));
    plain
        .check_against(&base("lora_list_untied"), BaseCheck::SameTable)
        .unwrap();
    let error = case("llama_untied").without_tokens().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::File);
}

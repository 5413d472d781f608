//! Adapters read and written: PEFT's own bytes, and what this crate adds.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::{adapter_dirs, fixtures};
use serde_json::json;
use trainable_tokens_core::{BackendError as _, DType, ErrorKind, TokenId, TokenRows, TokenSet};
use trainable_tokens_format::{
    Adapter, AdapterConfig, AdapterMetadata, AdapterModule, BaseCheck, Checkpoint, Error, Overwrite,
    SafetensorsFile, TargetModules, TaskType, digest,
};

/// Fixtures whose copies for tied modules differ, or whose names PEFT does not save; `tied_key_variants` made them
/// by hand.
const REFUSED: [&str; 6] = [
    "adapter_disagree_embed",
    "adapter_disagree_head",
    "adapter_head_only",
    "adapter_no_prefix",
    "adapter_token_adapter_key",
    "adapter_with_adapter_name",
];

fn rows(num_rows: usize, dim: usize) -> TokenRows {
    let values = (0..num_rows * dim).map(|at| f32::from(u16::try_from(at).unwrap()));
    TokenRows::new(values.collect(), num_rows, dim).unwrap()
}

fn tokens(ids: &[u32]) -> TokenSet {
    TokenSet::new(ids.iter().copied(), 300).unwrap()
}

#[test]
fn what_peft_wrote_is_written_again_byte_for_byte() {
    let mut read = 0;
    for dir in adapter_dirs() {
        let config_bytes = fs::read(dir.join("adapter_config.json")).unwrap();
        let config = AdapterConfig::from_json(&config_bytes, "adapter_config.json").unwrap();
        assert_eq!(config.to_json().as_bytes(), config_bytes, "{}", dir.display());
        if REFUSED.iter().any(|name| dir.ends_with(name)) {
            assert!(Adapter::read(&dir).is_err(), "{}", dir.display());
            continue;
        }
        let adapter = Adapter::read(&dir).unwrap();
        let out = tempfile::tempdir().unwrap();
        adapter.write(out.path().join("copy"), Overwrite::Refuse).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let (ours, theirs) = (out.path().join("copy").join(file), dir.join(file));
            assert_eq!(
                fs::read(ours).unwrap(),
                fs::read(theirs).unwrap(),
                "{}",
                dir.display()
            );
        }
        read += 1;
    }
    assert!(read >= 20, "{read}");
}

#[test]
fn adapters_are_read_in_full() {
    let adapter = Adapter::read(fixtures().join("llama_tied/adapter")).unwrap();
    assert_eq!(adapter.modules()[0].token_indices(), [277, 5, 0, 131, 64]);
    assert_eq!(
        adapter.config().target_modules(),
        &TargetModules::from(["embed_tokens"])
    );
    assert_eq!(adapter.config().base_model_name_or_path(), Some("base"));
    assert_eq!(adapter.config().peft_version(), Some("0.21.2"));
    assert_eq!(adapter.config().task_type(), None);
    assert_eq!(
        adapter.config().auto_mapping().unwrap()["base_model_class"],
        "LlamaForCausalLM"
    );
    let [module] = adapter.modules() else {
        panic!("{:?}", adapter.modules())
    };
    assert_eq!(module.path(), "model.embed_tokens");
    assert_eq!(module.tied_paths(), ["lm_head"]);
    assert_eq!(module.rows().shape(), [5, 40]);
    assert!(adapter.rows("lm_head").unwrap().bits_eq(module.rows()));
    assert_eq!(*adapter.metadata(), AdapterMetadata::none());
    let base = Checkpoint::open(fixtures().join("llama_tied/base")).unwrap();
    adapter.check_against(&base, BaseCheck::SameTable).unwrap();
    adapter.check_sizes(320, 40).unwrap();
    assert_eq!(
        adapter.check_sizes(277, 40).unwrap_err().kind(),
        ErrorKind::TokenOutOfRange
    );
    assert_eq!(adapter.check_sizes(320, 41).unwrap_err().kind(), ErrorKind::Shape);
}

#[test]
fn independent_targets_keep_their_own_rows() {
    for (case, paths) in [
        ("target_regex", ["dec.emb", "enc.emb"]),
        ("target_suffix_list", ["dec.emb", "enc.emb"]),
        ("target_list_two", ["emb_image", "emb_text"]),
    ] {
        let adapter = Adapter::read(fixtures().join(case).join("adapter")).unwrap();
        let modules = adapter.modules();
        assert_eq!(
            modules.iter().map(AdapterModule::path).collect::<Vec<_>>(),
            paths,
            "{case}"
        );
        assert!(modules.iter().all(|module| module.tied_paths().is_empty()));
        let base = Checkpoint::open(fixtures().join(case).join("base")).unwrap();
        adapter.check_against(&base, BaseCheck::Fits).unwrap();
    }
    let t5 = Adapter::read(fixtures().join("t5_tied/adapter")).unwrap();
    assert_eq!(t5.modules()[0].path(), "shared");
    assert_eq!(t5.modules()[0].tied_paths().len(), 3);
}

#[test]
fn tied_copies_that_differ_are_named() {
    for case in ["adapter_disagree_embed", "adapter_disagree_head"] {
        let error = Adapter::read(fixtures().join("tied_key_variants").join(case)).unwrap_err();
        let Error::TiedCopies { first, second, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(
            first,
            "base_model.model.model.embed_tokens.trainable_tokens_delta"
        );
        assert_eq!(second, "base_model.model.lm_head.trainable_tokens_delta");
    }
}

#[test]
fn an_empty_set_of_tokens_is_read_if_the_rows_are_empty_too() {
    let adapter = Adapter::read(fixtures().join("variant_k0/adapter")).unwrap();
    assert!(adapter.modules()[0].token_ids().is_empty());
    assert_eq!(adapter.modules()[0].rows().shape(), [0, 6]);
    assert_eq!(adapter.first_non_finite(), None);
}

#[test]
fn extra_tensors_are_kept() {
    let adapter = Adapter::read(fixtures().join("resized_vocab_tied/adapter")).unwrap();
    let extra: Vec<_> = adapter.extra_tensors().collect();
    assert_eq!(
        extra,
        [
            "base_model.model.lm_head.base_layer.weight",
            "base_model.model.model.embed_tokens.base_layer.weight"
        ]
    );
}

#[test]
fn a_built_adapter_is_read_back() {
    let base = Checkpoint::open(fixtures().join("llama_tied/base")).unwrap();
    let table = base.table("model.embed_tokens.weight").unwrap();
    let set = TokenSet::new([7, 300, 2], 320).unwrap();
    let names = ["<a>", "é\n", "\u{1F600}"].map(String::from).to_vec();
    let adapter = Adapter::builder("model.embed_tokens", &set, rows(3, 40))
        .tied("lm_head")
        .base_model_name_or_path("org/model")
        .tokens(names.clone())
        .base(table.digest(), DType::F32)
        .init("keep")
        .build()
        .unwrap();
    let out = tempfile::tempdir().unwrap();
    adapter.write_into(out.path()).unwrap();
    let back = Adapter::read(out.path()).unwrap();
    assert_eq!(back.modules(), adapter.modules());
    assert_eq!(back.config(), adapter.config());
    assert_eq!(back.metadata(), adapter.metadata());
    assert_eq!(back.metadata().tokens, Some(names));
    assert_eq!(back.metadata().vocab_size, Some(320));
    assert_eq!(back.config().task_type(), Some(TaskType::CausalLm));
    assert_eq!(
        back.config().target_modules(),
        &TargetModules::from(["embed_tokens"])
    );
    assert_eq!(back.config().field("revision"), Some(json!(null)));
    assert_eq!(back.metadata().base_digest, Some(digest(&table).unwrap()));
    assert_eq!(back.to_safetensors().unwrap(), adapter.to_safetensors().unwrap());
    let header = SafetensorsFile::open(out.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(header.metadata().unwrap()["trainable_tokens.format_version"], "1");
    assert_eq!(header.metadata().unwrap()["format"], "pt");
}

#[test]
fn without_metadata_the_file_is_that_of_peft() {
    let dir = fixtures().join("llama_tied/adapter");
    let theirs = Adapter::read(&dir).unwrap();
    let set = theirs.modules()[0].token_set(320).unwrap();
    let ours = Adapter::builder("model.embed_tokens", &set, theirs.modules()[0].rows().clone())
        .tied("lm_head")
        .task_type(None)
        .base_model_name_or_path("base")
        .without_metadata()
        .build()
        .unwrap();
    let auto_mapping = theirs.config().auto_mapping().unwrap();
    let config = ours.config().with_field("auto_mapping", &auto_mapping).unwrap();
    assert_eq!(
        config.to_json().as_bytes(),
        fs::read(dir.join("adapter_config.json")).unwrap()
    );
    assert_eq!(
        ours.to_safetensors().unwrap(),
        fs::read(dir.join("adapter_model.safetensors")).unwrap()
    );
}

#[test]
fn permuted_ids_are_an_error_where_metadata_tell() {
    let adapter = Adapter::builder("emb", &tokens(&[5, 1, 9]), rows(3, 4))
        .build()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    adapter.write_into(dir.path()).unwrap();
    let path = dir.path().join("adapter_config.json");
    let permuted = adapter
        .config()
        .with_field("token_indices", &json!([1, 5, 9]))
        .unwrap();
    fs::write(&path, permuted.to_json()).unwrap();
    let error = Adapter::read(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Metadata { .. }), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("[5, 1, 9]") && message.contains("[1, 5, 9]"),
        "{message}"
    );
}

#[test]
fn metadata_are_checked_against_the_rest() {
    let adapter = Adapter::builder("emb", &tokens(&[5, 1]), rows(2, 4))
        .build()
        .unwrap();
    let with = |change: fn(&mut AdapterMetadata)| {
        let mut metadata = adapter.metadata().clone();
        change(&mut metadata);
        adapter.clone().with_metadata(metadata)
    };
    assert!(with(|_| ()).is_ok());
    assert!(with(|metadata| metadata.embedding_dim = Some(5)).is_err());
    assert!(with(|metadata| metadata.vocab_size = Some(5)).is_err());
    assert!(with(|metadata| metadata.tokens = Some(vec!["a".into()])).is_err());
    assert!(with(|metadata| metadata.token_indices = Some(vec![1, 5])).is_err());
    let config = adapter
        .config()
        .with_field("token_indices", &json!([1, 2, 3]))
        .unwrap();
    assert!(adapter.clone().with_config(config).is_err());
}

#[test]
fn another_base_is_told_by_its_digest() {
    let base = Checkpoint::open(fixtures().join("standalone_f32/base")).unwrap();
    let table = base.table("emb.weight").unwrap();
    let set = TokenSet::new([3, 1], 37).unwrap();
    let build = |digest, dtype| {
        Adapter::builder("emb", &set, rows(2, 8))
            .base(digest, dtype)
            .build()
            .unwrap()
    };
    let right = build(table.digest(), DType::F32);
    right.check_against(&base, BaseCheck::SameTable).unwrap();
    let other = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let wrong = build(other, DType::F32);
    wrong.check_against(&base, BaseCheck::Fits).unwrap();
    assert!(wrong.check_against(&base, BaseCheck::SameTable).is_err());
    let wrong = build(table.digest(), DType::BF16);
    assert_eq!(
        wrong
            .check_against(&base, BaseCheck::SameTable)
            .unwrap_err()
            .kind(),
        ErrorKind::DType
    );
}

#[test]
fn what_does_not_fit_together_is_not_built() {
    let set = tokens(&[5, 1]);
    let build = |builder: trainable_tokens_format::AdapterBuilder| builder.build().map(drop);
    assert!(build(Adapter::builder("emb", &set, rows(3, 4))).is_err());
    assert!(build(Adapter::builder("emb", &set, rows(2, 4)).tied("emb")).is_err());
    assert!(build(Adapter::builder("emb", &set, rows(2, 4)).target_modules(["wte"])).is_err());
    assert!(build(Adapter::builder("emb", &set, rows(2, 4)).tokens(vec![])).is_err());
    let empty: [&str; 0] = [];
    assert!(build(Adapter::builder("emb", &set, rows(2, 4)).target_modules(empty)).is_err());
    let two = Adapter::builder("a.emb", &set, rows(2, 4)).module("b.emb", rows(2, 6));
    let two = two.build().unwrap();
    assert_eq!(two.metadata().embedding_dim, None);
    assert_eq!(two.config().target_modules(), &TargetModules::from(["emb"]));
}

#[test]
fn values_that_are_not_finite_are_found() {
    let adapter = Adapter::read(fixtures().join("malformed/nan_value/adapter")).unwrap();
    let (path, id, column) = adapter.first_non_finite().unwrap();
    assert_eq!(path, "emb");
    assert!([20, 2, 7].map(TokenId).contains(&id));
    assert!(column < 6);
}

#[test]
fn unknown_fields_and_keys_survive() {
    let text = r#"{"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["emb"],
        "x": {"b": [1e-05, "é"], "a": 12345678901234567890123}}"#;
    let config = AdapterConfig::from_json(text.as_bytes(), "c.json").unwrap();
    let again = config.to_json();
    assert!(
        again.contains("1e-05") && again.contains("12345678901234567890123") && again.contains("\\u00e9")
    );
    assert_eq!(
        AdapterConfig::from_json(again.as_bytes(), "c.json").unwrap(),
        config
    );
    assert_eq!(config.field("missing"), None);
    assert!(
        config
            .with_field("peft_type", &json!("LOHA"))
            .unwrap_err()
            .to_string()
            .contains("LOHA")
    );
}

#[test]
fn an_absent_adapter_is_told_apart_from_a_broken_one() {
    let error = Adapter::read(Path::new("no such directory")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no such directory does not exist; expected an adapter directory"
    );
    assert_eq!(error.kind(), ErrorKind::File);
}

#[test]
fn copies_without_rows_may_claim_any_length() {
    let config = br#"{"peft_type":"TRAINABLE_TOKENS","target_modules":["emb"],"token_indices":[]}"#;
    let config = AdapterConfig::from_json(config, "adapter_config.json").unwrap();
    let tensor = |module: &str, columns: usize| {
        format!(
            r#""base_model.model.{module}.trainable_tokens_delta":{{"dtype":"F32","shape":[0,{columns}],"data_offsets":[0,0]}}"#
        )
    };
    let header = format!("{{{},{}}}", tensor("emb", 1 << 62), tensor("head", 1));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let file = SafetensorsFile::from_bytes("adapter_model.safetensors", bytes).unwrap();
    let error = Adapter::from_parts(config, &file).unwrap_err();
    assert!(matches!(error, Error::TiedCopies { .. }), "{error}");
}

#[test]
fn a_file_cannot_claim_ids_or_modules_without_end() {
    let read = |ids: &str, modules: usize, shape: &str| {
        let config =
            format!(r#"{{"peft_type":"TRAINABLE_TOKENS","target_modules":".*","token_indices":{ids}}}"#);
        let config = AdapterConfig::from_json(config.as_bytes(), "adapter_config.json").unwrap();
        let tensors: Vec<_> = (0..modules)
            .map(|at| format!(r#""base_model.model.m{at}.trainable_tokens_delta":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}"#))
            .collect();
        let header = format!("{{{}}}", tensors.join(","));
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        Adapter::from_parts(config, &SafetensorsFile::from_bytes("rows", bytes).unwrap())
    };
    read("[]", 1024, "[0,4]").unwrap();
    let many = read("[]", 1025, "[0,4]").unwrap_err();
    assert!(matches!(many, Error::Unsupported { .. }), "{many}");
    let thin = read("[1,2]", 1, "[2,0]").unwrap_err();
    assert!(matches!(thin, Error::TensorShape { .. }), "{thin}");
}

//! Making adapters with weights of LoRA.
#![allow(clippy::unwrap_used)]

mod common;

use common::fixtures;
use serde_json::json;
use trainable_tokens_core::{DType, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, AdapterConfig, Checkpoint, Overwrite, TargetModules, TokenIndices};

/// What the builder writes is what the reader finds, bit for bit.
#[test]
fn factors_are_written_and_read() {
    let config = AdapterConfig::lora(&TokenIndices::ByModule([].into())).unwrap();
    let config = config.with_field("r", &json!(2)).unwrap();
    let config = config
        .with_target_modules(&TargetModules::List(vec!["q_proj".to_owned()]))
        .unwrap();
    let tokens = TokenSet::new([4, 1], 6).unwrap();
    let rows = TokenRows::new(vec![0.5f32; 6], 2, 3).unwrap();
    let a = TokenRows::new(vec![1.0f32, -2.0, 3.0, 0.25, 0.5, -0.0], 2, 3).unwrap();
    let b = TokenRows::new(vec![7.0f32, 0.125, -1.0, 9.0], 2, 2)
        .unwrap()
        .to_dtype(DType::BF16);
    let adapter = Adapter::builder("model.embed_tokens", &tokens, rows)
        .lora(config)
        .lora_linear("model.layers.0.self_attn.q_proj", &a, &b)
        .build()
        .unwrap();
    let home = tempfile::tempdir().unwrap();
    adapter.write(home.path().join("a"), Overwrite::Refuse).unwrap();
    let read = Adapter::read(home.path().join("a")).unwrap();
    let weights = read.lora_weights().unwrap();
    assert_eq!(weights.len(), 1);
    assert_eq!(weights[0].path(), "model.layers.0.self_attn.q_proj");
    let [a_read, b_read] = weights[0].factors().unwrap();
    assert!(a_read.bits_eq(&a) && b_read.bits_eq(&b));
    assert!(!weights[0].replaces_base());
}

#[test]
fn a_config_names_its_modules_of_a_model() {
    let base = Checkpoint::open(fixtures().join("lora_list_untied/base")).unwrap();
    let config = AdapterConfig::lora(&TokenIndices::ByModule([].into())).unwrap();
    let named = |targets: TargetModules| config.with_target_modules(&targets).unwrap().lora_modules(&base);
    let list = |names: &[&str]| TargetModules::List(names.iter().map(|name| (*name).to_owned()).collect());
    let found = named(list(&["v_proj", "self_attn.q_proj", "norm"])).unwrap();
    let expected = [0, 0, 1, 1].iter().zip(["q_proj", "v_proj", "q_proj", "v_proj"]);
    let expected: Vec<_> = expected
        .map(|(layer, name)| format!("model.layers.{layer}.self_attn.{name}"))
        .collect();
    assert_eq!(found, expected, "a norm is no matrix");
    let pattern = TargetModules::Pattern(r"model\.layers\.1\.mlp\..*".to_owned());
    assert_eq!(named(pattern).unwrap().len(), 3);
    assert_eq!(named(list(&["proj"])).unwrap(), Vec::<String>::new());
    let error = named(TargetModules::Default).unwrap_err().to_string();
    assert!(error.contains("target_modules"), "{error}");
}

//! What a model's names and config tell, and what an adapter targets in it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::fixtures;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use trainable_tokens_format::{
    Adapter, AdapterConfig, BaseCheck, Checkpoint, Error, ModelTables, TargetModules, TokenIndices,
};

/// Classes that names and a config do not tell: their input embedding is another one, or more is tied with it.
const MISLEADING: [&str; 8] = [
    // The table is stored once more as `model.shared`.
    "MarianMTModel",
    // The language model is one part of several.
    "NemotronH_Omni_Reasoning_V3",
    "PI0ForConditionalGeneration",
    // Encoder and decoder share their tables under names of their own.
    "ProphetNetForConditionalGeneration",
    "T5Gemma2ForConditionalGeneration",
    // The decoder's table, which is tied to the first one by name.
    "ProphetNetForCausalLM",
    "SeamlessM4TForTextToText",
    "SeamlessM4Tv2ForTextToText",
];

/// A checkpoint of these tensors, of zeros.
fn checkpoint(dir: &Path, config: &Value, tensors: &[(&str, &[usize])]) -> Checkpoint {
    let zeros = vec![0; 1 << 16];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = &zeros[..4 * shape.iter().product::<usize>()];
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(dir.join("model.safetensors"), file).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn tables(case: &str) -> ModelTables {
    ModelTables::of(&Checkpoint::open(fixtures().join(case).join("base")).unwrap()).unwrap()
}

fn standalone(targets: impl Into<TargetModules>) -> AdapterConfig {
    AdapterConfig::new(&[2, 1], &targets.into()).unwrap()
}

fn lora(ids: &[(&str, &[u32])]) -> AdapterConfig {
    let ids = ids.iter().map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
    AdapterConfig::lora(&TokenIndices::ByModule(ids.collect())).unwrap()
}

fn pattern(text: &str) -> TargetModules {
    TargetModules::Pattern(text.to_owned())
}

/// The paths that a config targets.
fn paths(model: &ModelTables, config: &AdapterConfig) -> Vec<String> {
    let targets = model.targets(config).unwrap();
    targets.into_iter().map(|target| target.path).collect()
}

#[test]
fn the_tables_of_transformers_models_are_known() {
    let text = fs::read(fixtures().join("../transformers/tables.json")).unwrap();
    let classes: Vec<Value> = serde_json::from_slice(&text).unwrap();
    assert!(classes.len() > 300);
    let mut wrong = Vec::new();
    let mut misleading = BTreeSet::from(MISLEADING);
    for class in &classes {
        let name = class["architecture"].as_str().unwrap();
        let tensors = class["tensors"].as_array().unwrap().iter();
        let tensors: Vec<_> = tensors
            .map(|name| (name.as_str().unwrap(), &[1, 1][..]))
            .collect();
        let config = json!({"architectures": [name], "tie_word_embeddings": class["tie_word_embeddings"]});
        let dir = tempfile::tempdir().unwrap();
        let model = ModelTables::of(&checkpoint(dir.path(), &config, &tensors)).unwrap();
        let found = json!([model.input_embedding(), model.tied()]);
        if found != json!([class["input_embedding"], class["tied"]]) && !misleading.remove(name) {
            wrong.push(format!(
                "{name}: {found}, not {} and {}",
                class["input_embedding"], class["tied"]
            ));
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
    assert!(misleading.is_empty(), "{misleading:?} no longer mislead");
}

#[test]
fn the_models_of_the_fixtures_are_known() {
    for (case, embedding, tied, head) in [
        ("llama_tied", "model.embed_tokens", &["lm_head"][..], None),
        ("llama_untied", "model.embed_tokens", &[], Some("lm_head")),
        ("gpt2_tied", "transformer.wte", &["lm_head"], None),
        (
            "bert_mlm",
            "bert.embeddings.word_embeddings",
            &["cls.predictions.decoder"],
            None,
        ),
        (
            "t5_tied",
            "shared",
            &["decoder.embed_tokens", "encoder.embed_tokens", "lm_head"],
            None,
        ),
        (
            "bart_tied",
            "model.shared",
            &[
                "lm_head",
                "model.decoder.embed_tokens",
                "model.encoder.embed_tokens",
            ],
            None,
        ),
    ] {
        let model = tables(case);
        assert_eq!(model.input_embedding(), Some(embedding), "{case}");
        assert_eq!(model.tied(), tied, "{case}");
        assert_eq!(model.head(), head, "{case}");
        // What PEFT stored is what these say.
        let adapter = Adapter::read(fixtures().join(case).join("adapter")).unwrap();
        let targets = model.targets(adapter.config()).unwrap();
        let [target] = targets.as_slice() else {
            panic!("{targets:?}")
        };
        let module = adapter.module(&target.path).unwrap();
        let stored: BTreeSet<_> = module.all_paths().collect();
        let expected = target.tied.iter().map(String::as_str).chain([embedding]);
        assert_eq!(stored, expected.collect(), "{case}");
    }
    assert_eq!(tables("target_none_getter").input_embedding(), None);
}

#[test]
fn targets_resolve_as_in_peft() {
    for (case, targets, expected) in [
        (
            "target_list_two",
            TargetModules::from(["emb_text", "emb_image"]),
            &["emb_image", "emb_text"][..],
        ),
        ("target_regex", pattern(r".*\.emb"), &["dec.emb", "enc.emb"]),
        ("target_suffix_list", ["emb"].into(), &["dec.emb", "enc.emb"]),
        ("target_list_fullpath", ["dec.emb"].into(), &["dec.emb"]),
        (
            "target_none_getter",
            pattern("body.word_embed"),
            &["body.word_embed"],
        ),
        ("target_none_top", TargetModules::Default, &["embed_tokens"]),
        ("target_none_top", pattern("embed_tokens"), &["embed_tokens"]),
        ("target_lm_head_linear", ["lm_head"].into(), &["lm_head"]),
        ("gpt2_tied", TargetModules::Default, &["transformer.wte"]),
        (
            "llama_tied",
            ["lm_head", "embed_tokens"].into(),
            &["model.embed_tokens"],
        ),
        (
            "llama_untied",
            pattern(".*(embed_tokens|lm_head)"),
            &["lm_head", "model.embed_tokens"],
        ),
    ] {
        assert_eq!(
            paths(&tables(case), &standalone(targets.clone())),
            expected,
            "{case} {targets:?}"
        );
    }
    for (case, targets) in [
        ("target_missing", TargetModules::from(["nope"])),
        ("target_none_nested", TargetModules::Default),
        ("target_str_nested", pattern("embed_tokens")),
        ("target_suffix_list", ["b"].into()),
    ] {
        let error = tables(case).targets(&standalone(targets)).unwrap_err();
        assert!(matches!(error, Error::NoTarget { .. }), "{case}: {error}");
    }
    assert_eq!(
        paths(&tables("lora_list_tied"), &lora(&[("embed_tokens", &[1])])),
        ["model.embed_tokens"]
    );
    let list = AdapterConfig::lora(&TokenIndices::List(vec![1])).unwrap();
    assert_eq!(paths(&tables("lora_list_untied"), &list), ["model.embed_tokens"]);
    let error = tables("lora_list_untied")
        .targets(&lora(&[("wte", &[1])]))
        .unwrap_err();
    assert!(error.to_string().contains("\"wte\""), "{error}");
}

#[test]
fn callers_name_the_modules_of_other_models() {
    let model = ModelTables::named(["enc.emb", "dec.emb", "out"]);
    assert_eq!(paths(&model, &standalone(["emb"])), ["dec.emb", "enc.emb"]);
    assert!(model.targets(&standalone(TargetModules::Default)).is_err());
    let model = model
        .with_input_embedding("enc.emb")
        .with_tied(["out", "dec.emb"]);
    assert_eq!(paths(&model, &standalone(TargetModules::Default)), ["enc.emb"]);
    let targets = model.targets(&standalone(["emb"])).unwrap();
    assert_eq!(targets.len(), 1);
    assert_eq!(targets[0].tied, ["dec.emb", "out"]);
    assert_eq!(targets[0].token_indices, [2, 1]);
}

#[test]
fn f8_a_tied_model_has_one_set_of_tokens() {
    let model = tables("lora_dict_tied_different");
    let different = lora(&[("embed_tokens", &[149, 3, 40]), ("lm_head", &[7, 148])]);
    assert!(matches!(model.targets(&different), Err(Error::TiedTokens { .. })));
    // The same tokens in another order are other rows.
    let reordered = lora(&[("embed_tokens", &[149, 3]), ("lm_head", &[3, 149])]);
    assert!(matches!(model.targets(&reordered), Err(Error::TiedTokens { .. })));
    for config in [lora(&[("lm_head", &[7])]), standalone(["lm_head"])] {
        assert!(
            matches!(model.targets(&config), Err(Error::TiedTokens { .. })),
            "the head alone"
        );
    }
    let same = lora(&[("embed_tokens", &[149, 3]), ("lm_head", &[149, 3])]);
    assert_eq!(paths(&model, &same), ["model.embed_tokens"]);
    assert_eq!(
        paths(&tables("lora_dict_untied"), &different),
        ["lm_head", "model.embed_tokens"]
    );
}

/// PEFT wraps any linear layer that a target hits, and trains rows of it.
#[test]
fn f19_only_tables_are_targeted() {
    for (case, target) in [
        ("llama_untied", "q_proj"),
        ("llama_untied", "down_proj"),
        ("llama_untied", "norm"),
        ("bert_mlm", "query"),
        ("bert_mlm", "cls.predictions.transform.dense"),
        ("gpt2_tied", "c_attn"),
        ("t5_tied", "wi"),
    ] {
        let error = tables(case).targets(&standalone([target])).unwrap_err();
        assert!(
            matches!(&error, Error::NotATable { module, .. } if module.ends_with(target)),
            "{case}: {error}"
        );
    }
    let adapter = Adapter::read(fixtures().join("target_lm_head_linear/adapter")).unwrap();
    let base = Checkpoint::open(fixtures().join("target_lm_head_linear/base")).unwrap();
    adapter.check_against(&base, BaseCheck::Fits).unwrap();
    // Rows of a linear layer, as a file.
    let rows = trainable_tokens_core::TokenRows::zeros(trainable_tokens_core::DType::F32, 1, 24);
    let set = trainable_tokens_core::TokenSet::new([2], 24).unwrap();
    let wrong = Adapter::builder("model.layers.0.self_attn.q_proj", &set, rows)
        .build()
        .unwrap();
    let error = wrong.check_against(&base, BaseCheck::Fits).unwrap_err();
    assert!(matches!(error, Error::NotATable { .. }), "{error}");
}

#[test]
fn a_config_may_leave_tying_to_the_tensors() {
    let tied = |tie: Value, tensors: &[(&str, &[usize])]| {
        let dir = tempfile::tempdir().unwrap();
        let config =
            json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tie, "vocab_size": 8});
        ModelTables::of(&checkpoint(dir.path(), &config, tensors))
            .unwrap()
            .tied()
            .to_vec()
    };
    let table: (&str, &[usize]) = ("model.embed_tokens.weight", &[8, 2]);
    let head: (&str, &[usize]) = ("lm_head.weight", &[8, 2]);
    assert_eq!(tied(json!(null), &[table]), ["lm_head"]);
    assert!(tied(json!(null), &[table, head]).is_empty());
    assert_eq!(tied(json!(true), &[table, head]), ["lm_head"]);
    assert!(tied(json!(false), &[table]).is_empty());
    let dir = tempfile::tempdir().unwrap();
    let base = checkpoint(dir.path(), &json!([]), &[table]);
    assert_eq!(ModelTables::of(&base).unwrap().input_embedding(), None);
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(matches!(ModelTables::of(&base), Err(Error::Json { .. })));
}

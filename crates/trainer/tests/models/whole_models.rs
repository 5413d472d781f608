//! PEFT's operations on whole models: all of them, but those that the kit lists as not run.

use std::collections::BTreeSet;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::Module;
use serde_json::{Value, json};
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::EmbeddingSource;
use trainable_tokens_format::BaseCheck;
use trainable_tokens_testkit::peft::{CASES, NOT_RUN, WholeModel, not_run};
use trainable_tokens_trainer::{Architecture, Error, LanguageModel};

use crate::case::{self, Case, check, flat};

/// Cases whose training runs in `training.rs`.
const TRAINED: [&str; 11] = [
    "bert_mlm",
    "gemma2_tied",
    "gpt2_tied",
    "llama_tied",
    "llama_untied",
    "lora_dict_tied_same",
    "lora_dict_untied",
    "lora_list_gemma2",
    "lora_list_tied",
    "lora_list_untied",
    "qwen2_sharded",
];

/// How far an operation lets a result lie from PEFT's.
fn tolerance(operation: &Value) -> [f64; 2] {
    ["atol", "rtol"].map(|name| operation[name].as_f64().unwrap())
}

#[test]
fn every_operation_that_is_not_listed_runs() {
    let mut trained = BTreeSet::new();
    let mut run = BTreeSet::new();
    for (name, _) in CASES {
        let case = Case::open(name);
        let operations = case.fixture.whole_model();
        let operations = operations.unwrap_or_else(|failure| panic!("{name}: {}", failure.reason()));
        for WholeModel {
            name: what,
            operation,
            ..
        } in operations
        {
            if not_run(name, &what).is_some() {
                continue;
            }
            match operation["op"].as_str().unwrap() {
                "logits" => logits(&case, &operation),
                "mixed_batch" => mixed(&case, &operation),
                "delta_grad" => head_gradient(&case, &operation),
                "train" => drop(trained.insert(*name)),
                other => panic!("{name}: {other} {what} neither runs nor is it listed"),
            }
            run.insert(*name);
        }
    }
    assert_eq!(trained, TRAINED.into());
    assert!(run.len() > TRAINED.len(), "{run:?}");
}

#[test]
fn what_is_listed_cannot_run() {
    for (name, _, reason) in NOT_RUN {
        let case = Case::open(name);
        if reason.ends_with("decoder") && reason.starts_with("needs a ") || reason.ends_with("encoder") {
            let config = Architecture::read(&case.base(&Value::Null).config_path());
            assert!(
                matches!(config, Err(Error::UnsupportedModel { .. })),
                "{name}: {reason}, but its config is read"
            );
            continue;
        }
        let adapter = case.adapter(&Value::Null);
        let is_refused = adapter
            .check_against(&case.base(&Value::Null), BaseCheck::Fits)
            .is_err();
        assert!(is_refused && reason.starts_with("is refused"), "{name}: {reason}");
    }
}

/// The head of an untied model with rows of its own, which start as the base's.
fn head(case: &Case, operation: &Value) -> TrainableTokens {
    let adapter = case.adapter(operation);
    let path = case.model(&json!({ "state": "base" })).head_module().unwrap();
    let module = adapter.modules().iter().find(|module| module.path() == path);
    let table = case.base(operation).table(&format!("{path}.weight")).unwrap();
    let shape = [table.vocab_size(), table.embedding_dim()];
    let table = Tensor::from_raw_buffer(table.bytes(), DType::F32, &shape, &Device::Cpu).unwrap();
    TrainableTokens::from_tensor(table, module.unwrap().token_indices()).unwrap()
}

fn hidden(case: &Case, operation: &Value, model: &LanguageModel) -> Tensor {
    let ids = operation["inputs"]["input_ids"].as_str().unwrap();
    case::hidden(model, &case.expected[ids])
}

fn logits_of(case: &Case, operation: &Value) -> Tensor {
    let model = case.model(operation);
    model.logits(&hidden(case, operation, &model)).unwrap()
}

/// Each example of a mixed batch, by the model with its adapter.
fn mixed(case: &Case, operation: &Value) {
    let examples = operation["adapter_names"].as_array().unwrap().iter().enumerate();
    let examples = examples.map(|(at, name)| {
        let mut alone = operation.clone();
        alone["state"] = if name == "__base__" { "base" } else { "adapter" }.into();
        alone["active"] = json!([name]);
        logits_of(case, &alone).get(at).unwrap()
    });
    let got = Tensor::stack(&examples.collect::<Vec<_>>(), 0).unwrap();
    let want = operation["expect"]["logits"].as_str().unwrap();
    let what = format!("{}: {want}", case.name);
    check(&what, &flat(&got), &case.flat(want), tolerance(operation));
}

fn logits(case: &Case, operation: &Value) {
    let got = logits_of(case, operation);
    let want = operation["expect"].as_str().unwrap();
    let what = format!("{}: {want}", case.name);
    check(&what, &flat(&got), &case.flat(want), tolerance(operation));
}

/// The gradient of the head's rows before any step: that of transformers' loss, where the logits at a position predict
/// the next label.
fn head_gradient(case: &Case, operation: &Value) {
    let mut operation = operation.clone();
    operation["state"] = "noop".into();
    let operation = &operation;
    let model = case.model(operation);
    let hidden = hidden(case, operation, &model);
    let head = head(case, operation);
    let (batch, length, _) = hidden.dims3().unwrap();
    let logits = head.tied_head().forward(&hidden).unwrap();
    let logits = logits.narrow(1, 0, length - 1).unwrap();
    let labels = &case.expected[operation["inputs"]["labels"].as_str().unwrap()];
    let labels = labels.narrow(1, 1, length - 1).unwrap().contiguous().unwrap();
    let targets = labels.reshape((batch * (length - 1), 1)).unwrap();
    let logits = logits.contiguous().unwrap().flatten_to(1).unwrap();
    let normalizer = logits
        .exp()
        .unwrap()
        .sum_keepdim(D::Minus1)
        .unwrap()
        .log()
        .unwrap();
    let loss = (normalizer - logits.gather(&targets, D::Minus1).unwrap()).unwrap();
    let loss = loss.mean_all().unwrap();
    let tolerance = tolerance(operation);
    let what = format!("{}: loss", case.name);
    check(&what, &flat(&loss), &case.flat("loss"), tolerance);
    let gradient = head.gradient(&loss.backward().unwrap()).unwrap();
    let want = operation["expect"].as_str().unwrap();
    let what = format!("{}: {want}", case.name);
    check(&what, &gradient.to_f32_vec(), &case.flat(want), tolerance);
}

/// What the embedding of a model returns that runs.
#[test]
fn embeddings_of_the_models_are_pefts() {
    let mut checked = 0;
    for name in TRAINED {
        let case = Case::open(name);
        for operation in case.fixture.json()["operations"].as_array().unwrap() {
            if operation["op"] == "embed_forward" {
                let ids = operation["inputs"]["ids"].as_str().unwrap();
                let got = case.model(operation).embed(&case.expected[ids]).unwrap();
                let want = operation["expect"].as_str().unwrap();
                let what = format!("{name}: {want}");
                check(&what, &flat(&got), &case.flat(want), tolerance(operation));
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 24);
}

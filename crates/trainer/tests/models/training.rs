//! PEFT's whole-model fixtures: training, of rows alone and beside weights of LoRA.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_format::{Adapter, PeftType};
use trainable_tokens_trainer::{Architecture, Dataset, TrainOptions, Trainer, Vocabulary};

use crate::case::{Case, check, with_adapter};

/// The training of a case.
fn training(case: &Case) -> &Value {
    let operations = case.fixture.json()["operations"].as_array().unwrap();
    operations.iter().find(|it| it["op"] == "train").unwrap()
}

/// The batches of a case as JSON Lines.
fn write_batches(case: &Case, path: &Path) {
    let lines = |name: &str| {
        case.expected[name]
            .flatten_to(1)
            .unwrap()
            .to_vec2::<i64>()
            .unwrap()
    };
    let mut text = String::new();
    let labels = training(case)["inputs"]["labels"].as_str().unwrap();
    for (ids, labels) in lines("batch.input_ids").iter().zip(lines(labels)) {
        writeln!(text, "{}", json!({"input_ids": ids, "labels": labels})).unwrap();
    }
    std::fs::write(path, text).unwrap();
}

fn trainer(case: &Case, data: &Path, recompute: bool) -> Trainer {
    let operation = training(case);
    let spec = &operation["optimizer"];
    assert_eq!(spec["type"], "AdamW");
    let number = |name: &str| spec[name].as_f64().unwrap();
    let options = TrainOptions {
        batch_size: 2,
        lr: number("lr"),
        beta1: spec["betas"][0].as_f64().unwrap(),
        beta2: spec["betas"][1].as_f64().unwrap(),
        eps: number("eps"),
        weight_decay: number("weight_decay"),
        recompute,
        ..TrainOptions::default()
    };
    let base = case.base(&Value::Null);
    let config = Architecture::read(&base.config_path()).unwrap();
    let data = Dataset::read(data, &Vocabulary::of_model(base.dir()), &config, None).unwrap();
    let model = match case.adapter(&Value::Null).config().peft_type() {
        PeftType::TrainableTokens => case.model(&json!({ "state": "noop" })),
        PeftType::Lora => with_adapter(&base, &case.start()),
    };
    Trainer::new(model, data, options).unwrap()
}

/// What a run saves.
fn saved(case: &Case, trainer: &Trainer) -> Adapter {
    let model = trainer.model();
    let rows = |layer: &TrainableTokens| (layer.tokens().clone(), layer.rows().unwrap());
    let (tokens, values) = rows(model.embedding());
    let mut builder = Adapter::builder(case.embedding_module(), &tokens, values);
    if case.adapter(&Value::Null).config().peft_type() == PeftType::Lora {
        builder = builder.lora(case.adapter(&Value::Null).config().clone());
        if let Some(head) = model.head_rows() {
            let (tokens, values) = rows(head);
            builder = builder.module_of(model.head_module().unwrap(), &tokens, values);
        }
        builder = model.add_low_rank(builder).unwrap();
    }
    builder.build().unwrap()
}

/// The rows of a module after each step, as PEFT recorded them: steps + 1 times `[k, D]`.
fn recorded(case: &Case, module: &str) -> Vec<f32> {
    let of_module = format!("deltas.base_model.model.{module}.token_adapter.trainable_tokens_delta.default");
    let name = if case.expected.contains_key("deltas") {
        "deltas"
    } else {
        &of_module
    };
    case.flat(name)
}

fn train(name: &str) {
    let case = Case::open(name);
    let operation = training(&case);
    let atol = |key: &str| {
        operation["atol"][key]
            .as_f64()
            .or(operation["atol"].as_f64())
            .unwrap()
    };
    let [loss_atol, delta_atol] = ["losses", "deltas"].map(atol);
    let rtol = operation["rtol"].as_f64().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("batches.jsonl");
    write_batches(&case, &data);

    let mut trainer = trainer(&case, &data, false);
    let probe = trainer.check_gradient().unwrap();
    assert!(probe.relative_error < 0.1, "{probe:?}");
    let losses = case.flat("losses");
    let steps = losses.len();
    assert_eq!(trainer.total_steps(), steps as u64);
    let embedding = case.embedding_module();
    let head = trainer
        .model()
        .head_rows()
        .and_then(|_| trainer.model().head_module());
    let mut modules = vec![embedding.as_str()];
    modules.extend(head.as_deref());
    for step in 0..steps {
        let metrics = trainer.step().unwrap();
        #[allow(clippy::cast_possible_truncation)]
        check(
            &format!("{name}: loss {step}"),
            &[metrics.loss as f32],
            &losses[step..=step],
            [loss_atol, rtol],
        );
        let now = saved(&case, &trainer);
        for module in &modules {
            let deltas = recorded(&case, module);
            let size = deltas.len() / (steps + 1);
            let want = &deltas[(step + 1) * size..][..size];
            let rows = now.rows(module).unwrap().to_f32_vec();
            let what = format!("{name}: rows of {module} after step {step}");
            check(&what, &rows, want, [delta_atol, rtol]);
        }
    }
    assert_eq!(
        trainer
            .largest_base_change(&case.base(&Value::Null))
            .unwrap()
            .to_bits(),
        0f64.to_bits()
    );

    // A run that is cut in two goes on bit for bit.
    let whole = saved(&case, &trainer);
    let cut = steps / 3;
    let mut first = self::trainer(&case, &data, false);
    (0..cut).for_each(|_| assert!(first.step().unwrap().loss > 0.0));
    let mut second = self::trainer(&case, &data, false);
    let state = first.training_state().unwrap();
    let path = Path::new("training_state.safetensors");
    second.resume(&saved(&case, &first), state, path).unwrap();
    assert_eq!(second.steps_taken(), cut as u64);
    (cut..steps).for_each(|_| assert!(second.step().unwrap().loss > 0.0));
    expect_same(&format!("{name}: resumed run"), &whole, &saved(&case, &second));

    // Activations that are computed again are the same.
    let mut thrifty = self::trainer(&case, &data, true);
    (0..steps).for_each(|_| assert!(thrifty.step().unwrap().loss > 0.0));
    expect_same(&format!("{name}: recomputation"), &whole, &saved(&case, &thrifty));
}

/// Equal bits in all that trained.
fn expect_same(what: &str, one: &Adapter, other: &Adapter) {
    for (ours, theirs) in one.modules().iter().zip(other.modules()) {
        assert!(ours.rows().bits_eq(theirs.rows()), "{what}: {}", ours.path());
    }
    for tensor in one.extra_tensors() {
        let bytes = |adapter: &Adapter| adapter.extra_tensor(tensor).unwrap().bytes.to_vec();
        assert_eq!(bytes(one), bytes(other), "{what}: {tensor}");
    }
}

#[test]
fn bert_mlm_train() {
    train("bert_mlm");
}

#[test]
fn llama_untied_train() {
    train("llama_untied");
}

#[test]
fn llama_tied_train() {
    train("llama_tied");
}

#[test]
fn lora_list_untied_train() {
    train("lora_list_untied");
}

#[test]
fn lora_list_tied_train() {
    train("lora_list_tied");
}

#[test]
fn lora_dict_untied_train() {
    train("lora_dict_untied");
}

#[test]
fn lora_dict_tied_same_train() {
    train("lora_dict_tied_same");
}

#[test]
fn qwen2_sharded_train() {
    train("qwen2_sharded");
}

#[test]
fn gemma2_tied_train() {
    train("gemma2_tied");
}

#[test]
fn lora_list_gemma2_train() {
    train("lora_list_gemma2");
}

#[test]
fn gpt2_tied_train() {
    train("gpt2_tied");
}

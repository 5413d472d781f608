//! PEFT's whole-model fixtures: training, of rows alone and beside weights of LoRA.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_format::{Adapter, PeftType};
use trainable_tokens_trainer::{Dataset, TrainOptions, Trainer, Vocabulary};

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
    trainer_with(case, data, |options| options.recompute = recompute)
}

fn trainer_with(case: &Case, data: &Path, change: impl FnOnce(&mut TrainOptions)) -> Trainer {
    let operation = training(case);
    let spec = &operation["optimizer"];
    assert_eq!(spec["type"], "AdamW");
    let number = |name: &str| spec[name].as_f64().unwrap();
    let mut options = TrainOptions {
        batch_size: 2,
        lr: number("lr"),
        beta1: spec["betas"][0].as_f64().unwrap(),
        beta2: spec["betas"][1].as_f64().unwrap(),
        eps: number("eps"),
        weight_decay: number("weight_decay"),
        ..TrainOptions::default()
    };
    change(&mut options);
    let base = case.base(&Value::Null);
    let vocabulary = Vocabulary::of_model(base.dir());
    let data = Dataset::read(data, &vocabulary, &case.config(), None).unwrap();
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
    let mut builder = Adapter::builder(model.embedding_module(), &tokens, values);
    if case.adapter(&Value::Null).config().peft_type() == PeftType::Lora {
        builder = builder.lora(case.adapter(&Value::Null).config().clone());
        if let Some(head) = model.head_rows() {
            let (tokens, values) = rows(head);
            builder = builder.module_of(case.head_module(), &tokens, values);
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
    let embedding = trainer.model().embedding_module();
    let mut modules = vec![embedding.as_str()];
    modules.extend(trainer.model().head_rows().map(|_| case.head_module()));
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
    assert_eq!(second.activity(), trainer.activity(), "{name}");

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

/// What an evaluation found best stays so, weights of LoRA included, while the run goes on and is resumed.
#[test]
fn the_best_values_are_kept_and_resumed() {
    const LOSSES: [f64; 6] = [5.0, 4.0, 4.5, 3.5, 3.75, 4.0];
    for name in ["llama_tied", "lora_list_untied"] {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("batches.jsonl");
        write_batches(&case, &data);
        let start = || trainer_with(&case, &data, |options| options.keep_best = true);
        let advance = |trainer: &mut Trainer, losses: &[f64]| {
            for loss in losses {
                trainer.step().unwrap();
                let lowest = trainer.best_evaluation().is_none_or(|best| *loss < best.loss);
                assert_eq!(trainer.record_evaluation(*loss).unwrap(), lowest);
            }
        };
        let mut whole = start();
        advance(&mut whole, &LOSSES);
        let last = saved(&case, &whole);
        let best = whole.best_evaluation().unwrap();
        assert_eq!((best.step, best.loss), (4, 3.5));

        let mut until_best = start();
        advance(&mut until_best, &LOSSES[..4]);
        let of_best = saved(&case, &until_best);
        let seen = whole.at_best(|trainer| Ok::<_, trainable_tokens_trainer::Error>(saved(&case, trainer)));
        expect_same(name, &seen.unwrap(), &of_best);
        expect_same(name, &saved(&case, &whole), &last);

        for cut in 1..LOSSES.len() {
            let mut first = start();
            advance(&mut first, &LOSSES[..cut]);
            let mut second = start();
            let state = first.training_state().unwrap();
            second
                .resume(&saved(&case, &first), state, Path::new("state"))
                .unwrap();
            let best =
                first.at_best(|trainer| Ok::<_, trainable_tokens_trainer::Error>(saved(&case, trainer)));
            second.resume_best(&best.unwrap()).unwrap();
            expect_same(name, &saved(&case, &second), &saved(&case, &first));
            advance(&mut second, &LOSSES[cut..]);
            expect_same(name, &saved(&case, &second), &last);
            second.restore_best().unwrap();
            expect_same(name, &saved(&case, &second), &of_best);
        }
    }
}

//! Encoders against transformers (`tests/fixtures/transformers/encoders`), and what they train for.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod lora;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use trainable_tokens_core::PaddingRule;
use trainable_tokens_format::{Adapter, Checkpoint};
use trainable_tokens_trainer::{
    Architecture, Dataset, EarlyStopping, Error, LanguageModel, MaskTrainable, Masking, Objective,
    OptimizerKind, Pooling, PoolingMode, Teach, TeachLoss, TrainOptions, Trainer, Vocabulary, evaluate,
};

const TOKENS: [u32; 3] = [77, 12, 40];
const RANKING: TeachLoss = TeachLoss::Ranking { scale: 20.0 };

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/transformers/encoders");
    fixtures.join(name)
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu).unwrap()
}

fn model_in(dir: &Path) -> LanguageModel {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let padding = PaddingRule::NoLookupGradient;
    LanguageModel::load(&checkpoint, &TOKENS, None, padding, DType::F32, &Device::Cpu).unwrap()
}

fn model(name: &str) -> LanguageModel {
    model_in(&fixture(name))
}

fn lengths(tensor: &Tensor) -> Vec<usize> {
    let lengths = tensor.to_vec1::<i64>().unwrap();
    lengths
        .into_iter()
        .map(|length| length.try_into().unwrap())
        .collect()
}

/// Of each row `[B, L, ..]` its first `lengths` values.
fn held(tensor: &Tensor, lengths: &[usize]) -> Vec<f32> {
    let rows = lengths.iter().enumerate().map(|(row, length)| {
        let row = tensor.get(row).unwrap().narrow(0, 0, *length).unwrap();
        row.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    rows.flatten().collect()
}

/// Within `limit` of the largest value.
#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f32], limit: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    let pairs = got.iter().zip(want);
    let apart = pairs.fold(0f32, |most, (got, want)| most.max((got - want).abs()));
    println!("{what}: {apart:.1e} apart, of {largest:.2}");
    assert!(apart <= limit * largest, "{what}: {apart} apart, of {largest}");
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn outputs_of_padded_batches_are_transformers() {
    for name in ["bert", "roberta", "sentences"] {
        let (model, want) = (model(name), expected(name));
        let (ids, lengths) = (&want["input_ids"], lengths(&want["lengths"]));
        let embeddings = model.embed(ids).unwrap();
        assert_eq!(flat(&embeddings.detach()), flat(&want["embeddings"]), "{name}");
        let hidden = model.hidden(&embeddings, ids, Some(&lengths)).unwrap();
        let states = |hidden: &Tensor| held(hidden, &lengths);
        assert_close(
            &format!("{name}: hidden states"),
            &states(&hidden),
            &states(&want["hidden"]),
            1e-5,
        );
        if let Some(logits) = want.get("logits") {
            let got = model.logits(&hidden).unwrap();
            assert_close(&format!("{name}: logits"), &states(&got), &states(logits), 1e-5);
        } else {
            let pooling = Pooling::of_model(&fixture(name)).unwrap().unwrap();
            let pooled = pooling.pool(&hidden, &lengths).unwrap();
            let what = format!("{name}: embeddings of sentences");
            assert_close(&what, &flat(&pooled), &flat(&want["sentences"]), 1e-5);
        }
    }
}

/// Half precision, against single.
#[test]
fn bf16_is_close() {
    let checkpoint = Checkpoint::open(fixture("roberta")).unwrap();
    let padding = PaddingRule::NoLookupGradient;
    let model = LanguageModel::load(&checkpoint, &TOKENS, None, padding, DType::BF16, &Device::Cpu).unwrap();
    let want = expected("roberta");
    let (ids, lengths) = (&want["input_ids"], lengths(&want["lengths"]));
    let hidden = model
        .hidden(&model.embed(ids).unwrap(), ids, Some(&lengths))
        .unwrap();
    let logits = model.logits(&hidden).unwrap().to_dtype(DType::F32).unwrap();
    let states = |tensor: &Tensor| held(tensor, &lengths);
    assert_close("bf16", &states(&logits), &states(&want["logits"]), 0.03);
}

/// The rows of tokens without padding as JSON Lines, with more fields by row.
fn lines(ids: &Tensor, held: &Tensor, more: impl Fn(usize, usize) -> Value) -> String {
    let rows = ids.to_vec2::<i64>().unwrap();
    let mut text = String::new();
    for (row, length) in lengths(held).into_iter().enumerate() {
        let mut line = json!({ "input_ids": rows[row][..length] });
        let more = more(row, length);
        line.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        writeln!(text, "{line}").unwrap();
    }
    text
}

fn labelled(name: &str) -> String {
    let want = expected(name);
    let labels = want["labels"].to_vec2::<i64>().unwrap();
    lines(
        &want["input_ids"],
        &want["lengths"],
        |row, length| json!({ "labels": labels[row][..length] }),
    )
}

fn defined() -> String {
    let want = expected("sentences");
    let definitions = want["definition_ids"].to_vec2::<i64>().unwrap();
    let held = lengths(&want["definition_lengths"]);
    let own = lengths(&want["own"]);
    lines(
        &want["input_ids"],
        &want["lengths"],
        |row, _| json!({ "definition_ids": definitions[own[row]][..held[own[row]]] }),
    )
}

fn dataset(dir: &Path, lines: &str) -> Dataset {
    let config = Architecture::read(&dir.join("config.json")).unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("data.jsonl");
    std::fs::write(&path, lines).unwrap();
    Dataset::read(&path, &Vocabulary::of_model(dir), &config, None).unwrap()
}

fn trainer(name: &str, lines: &str, options: TrainOptions) -> Result<Trainer, Error> {
    Trainer::new(model(name), dataset(&fixture(name), lines), options)
}

fn teach(loss: TeachLoss) -> Objective {
    let pooling = Pooling::of_model(&fixture("sentences")).unwrap().unwrap();
    Objective::Teach(Teach { pooling, loss })
}

/// One step down the slope: the rows move by the gradient, which is transformers'.
#[test]
fn losses_and_gradients_are_transformers() {
    let cases = [
        ("bert", labelled("bert"), None, "loss", "gradient"),
        ("roberta", labelled("roberta"), None, "loss", "gradient"),
        (
            "sentences",
            defined(),
            Some(teach(TeachLoss::Cosine)),
            "cosine_loss",
            "cosine_gradient",
        ),
        (
            "sentences",
            defined(),
            Some(teach(RANKING)),
            "ranking_loss",
            "ranking_gradient",
        ),
    ];
    for (name, lines, objective, loss, gradient) in cases {
        for recompute in [false, true] {
            let want = expected(name);
            let options = TrainOptions {
                objective: objective.clone(),
                optimizer: OptimizerKind::Sgd,
                lr: 1.0,
                recompute,
                ..TrainOptions::default()
            };
            let mut trainer = trainer(name, &lines, options).unwrap();
            let check = trainer.check_gradient().unwrap();
            assert!(
                check.relative_error > 0.0 && check.relative_error < 0.05,
                "{name}: {check:?}"
            );
            let before = trainer.model().embedding().rows().unwrap();
            let step = trainer.step().unwrap();
            let wanted = want[loss].to_scalar::<f32>().unwrap();
            assert!(
                (step.loss - f64::from(wanted)).abs() < 1e-5,
                "{name}: {} {wanted}",
                step.loss
            );
            let after = trainer.model().embedding().rows().unwrap();
            let pairs = before.to_f32_vec().into_iter().zip(after.to_f32_vec());
            let moved: Vec<f32> = pairs.map(|(before, after)| before - after).collect();
            assert_close(
                &format!("{name}: {gradient}"),
                &moved,
                &flat(&want[gradient]),
                1e-4,
            );
            let checkpoint = Checkpoint::open(fixture(name)).unwrap();
            assert_eq!(trainer.largest_base_change(&checkpoint).unwrap().to_bits(), 0);
        }
    }
}

fn masking() -> Masking {
    Masking {
        probability: 0.3,
        mask_token: 3,
        num_tokens: 90,
        special: vec![0, 1, 2, 3],
        trainable: MaskTrainable::Sometimes,
        seed: 5,
    }
}

fn unlabelled() -> String {
    let line = |row: u32| {
        let ids: Vec<u32> = (0..6 + row % 5)
            .map(|at| {
                if at == 2 {
                    TOKENS[(row % 3) as usize]
                } else {
                    4 + (row * 31 + at * 17) % 86
                }
            })
            .collect();
        format!("{}\n", json!({ "input_ids": ids }))
    };
    (0..7).map(line).collect()
}

fn adapter(trainer: &Trainer) -> Adapter {
    let layer = trainer.model().embedding();
    let rows = layer.rows().unwrap();
    Adapter::builder(trainer.model().embedding_module(), &layer.tokens(), rows)
        .build()
        .unwrap()
}

#[test]
fn masked_runs_resume_bit_for_bit() {
    let options = TrainOptions {
        objective: Some(Objective::Masked(Some(masking()))),
        steps: Some(9),
        batch_size: 3,
        lr: 0.01,
        shuffle: true,
        ..TrainOptions::default()
    };
    let new = |options: &TrainOptions| trainer("roberta", &unlabelled(), options.clone()).unwrap();
    let mut whole = new(&options);
    let losses: Vec<f64> = (0..9).map(|_| whole.step().unwrap().loss).collect();
    let mut first = new(&options);
    (0..4).for_each(|step| assert_eq!(first.step().unwrap().loss.to_bits(), losses[step].to_bits()));
    let state = || first.training_state().unwrap();
    let mut second = new(&options);
    second
        .resume(&adapter(&first), state(), Path::new("state"))
        .unwrap();
    (4..9).for_each(|step| assert_eq!(second.step().unwrap().loss.to_bits(), losses[step].to_bits()));
    assert!(
        adapter(&whole).modules()[0]
            .rows()
            .bits_eq(adapter(&second).modules()[0].rows())
    );

    assert_eq!(second.activity(), whole.activity());

    // Other masks are another run.
    let other = TrainOptions {
        objective: Some(Objective::Masked(Some(Masking { seed: 6, ..masking() }))),
        ..options
    };
    let mut other = new(&other);
    let error = other
        .resume(&adapter(&first), state(), Path::new("state"))
        .unwrap_err();
    assert!(error.to_string().contains("objective"), "{error}");
    assert_ne!(other.step().unwrap().loss.to_bits(), losses[0].to_bits());
}

#[test]
fn an_evaluation_has_the_same_masks_each_time() {
    let (model, data) = (model("bert"), dataset(&fixture("bert"), &unlabelled()));
    let loss = |masking: Masking, batch_size| {
        let objective = Objective::Masked(Some(masking));
        evaluate(&model, &data, &objective, batch_size).unwrap()
    };
    let (one, other) = (loss(masking(), 3), loss(masking(), 2));
    assert_eq!(one.tokens, other.tokens);
    assert!(
        (one.loss - other.loss).abs() < 1e-5,
        "{} {}",
        one.loss,
        other.loss
    );
    assert_eq!(loss(masking(), 3).loss.to_bits(), one.loss.to_bits());
    let always = Masking {
        trainable: MaskTrainable::Always,
        ..masking()
    };
    assert_ne!(loss(always, 3).tokens, one.tokens);
}

#[test]
fn taught_sentences_find_their_definitions() {
    for loss in [TeachLoss::Cosine, RANKING] {
        let options = TrainOptions {
            objective: Some(teach(loss)),
            steps: Some(60),
            lr: 0.01,
            ..TrainOptions::default()
        };
        let mut trainer = trainer("sentences", &defined(), options).unwrap();
        let measure = |trainer: &Trainer| trainer.evaluate(trainer.data()).unwrap();
        let before = measure(&trainer);
        (0..60).for_each(|_| assert!(trainer.step().unwrap().loss.is_finite()));
        let after = measure(&trainer);
        let [old, new] = [before, after].map(|it| it.retrieval.unwrap());
        assert!(after.loss < 0.95 * before.loss, "{before:?} {after:?}");
        assert!(new.mrr > old.mrr, "{old:?} {new:?}");
        assert_eq!((new.sentences, new.definitions), (4, 3));
        assert_eq!(after.perplexity, None);
    }
}

/// Transformers renames the norms' parameters of old checkpoints as it loads them.
#[test]
fn old_names_of_norms_are_read() {
    let home = tempfile::tempdir().unwrap();
    let from = fixture("bert");
    std::fs::copy(from.join("config.json"), home.path().join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let rename = |name: String| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        name.replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let tensors: HashMap<_, _> = tensors.into_iter().map(|(name, it)| (rename(name), it)).collect();
    assert!(tensors.keys().any(|name| name.ends_with("gamma")));
    candle_core::safetensors::save(&tensors, home.path().join("model.safetensors")).unwrap();
    let ids = &expected("bert")["input_ids"];
    let [new, old] = [from.as_path(), home.path()].map(|dir| {
        let model = model_in(dir);
        let hidden = model.hidden(&model.embed(ids).unwrap(), ids, None).unwrap();
        flat(&model.logits(&hidden).unwrap().detach())
    });
    assert_eq!(new, old);
}

/// With a table of its own, an output layer has its own bias too: the other one is not added.
#[test]
fn an_untied_head_has_its_own_bias() {
    let home = tempfile::tempdir().unwrap();
    let from = fixture("bert");
    let config = std::fs::read(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["tie_word_embeddings"] = json!(false);
    std::fs::write(home.path().join("config.json"), config.to_string()).unwrap();
    let mut tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let [table, bias] =
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"].map(|name| tensors[name].clone());
    tensors.insert("cls.predictions.decoder.weight".to_owned(), table);
    tensors.insert("cls.predictions.decoder.bias".to_owned(), (&bias + 1.0).unwrap());
    candle_core::safetensors::save(&tensors, home.path().join("model.safetensors")).unwrap();
    let ids = &expected("bert")["input_ids"];
    let [tied, untied] = [from.as_path(), home.path()].map(|dir| {
        let model = model_in(dir);
        let hidden = model.hidden(&model.embed(ids).unwrap(), ids, None).unwrap();
        model.logits(&hidden).unwrap().detach()
    });
    assert_close("logits", &flat(&untied), &flat(&(tied + 1.0).unwrap()), 1e-6);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let options = |objective| TrainOptions {
        objective: Some(objective),
        ..TrainOptions::default()
    };
    let masked = || Objective::Masked(Some(masking()));
    for (name, lines, objective, reason) in [
        (
            "bert",
            labelled("bert"),
            Objective::Causal,
            "the objective causal is not for an encoder",
        ),
        (
            "bert",
            unlabelled(),
            Objective::Masked(None),
            "line 1: has no labels",
        ),
        (
            "bert",
            labelled("bert"),
            teach(RANKING),
            "line 1: has no definition",
        ),
        (
            "sentences",
            defined(),
            masked(),
            "line 1: is a sentence with a definition",
        ),
        (
            "sentences",
            defined(),
            teach(TeachLoss::Ranking { scale: 0.0 }),
            "the ranking scale is 0",
        ),
        (
            "sentences",
            defined().lines().next().unwrap().to_owned(),
            teach(RANKING),
            "has one definition, but a ranking needs another",
        ),
        (
            "bert",
            unlabelled(),
            Objective::Masked(Some(Masking {
                probability: 0.0,
                ..masking()
            })),
            "the mask probability is 0",
        ),
    ] {
        let error = trainer(name, &lines, options(objective))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(reason), "{error}");
    }
    // A model of sentences predicts no tokens.
    let mut headless = trainer("sentences", &unlabelled(), options(masked())).unwrap();
    let error = headless.step().unwrap_err().to_string();
    assert!(error.contains("no head of masked language modelling"), "{error}");
    let ids = Tensor::new(&[[9u32; 21]], &Device::Cpu).unwrap();
    let model = model("roberta");
    let error = model.hidden(&model.embed(&ids).unwrap(), &ids, None).unwrap_err();
    assert!(
        error.to_string().contains("longer than the model's 20 positions"),
        "{error}"
    );
}

#[test]
fn pooling_is_what_modules_say() {
    let read = |modules: &str, config: &str| {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("modules.json"), modules).unwrap();
        std::fs::create_dir(home.path().join("1_Pooling")).unwrap();
        std::fs::write(home.path().join("1_Pooling/config.json"), config).unwrap();
        Pooling::of_model(home.path()).map_err(|error| error.to_string())
    };
    let modules = std::fs::read_to_string(fixture("sentences").join("modules.json")).unwrap();
    for (config, mode) in [
        (r#"{"pooling_mode_cls_token":true}"#, PoolingMode::Cls),
        (r#"{"pooling_mode":"cls"}"#, PoolingMode::Cls),
        (r#"{"pooling_mode_mean_tokens":true}"#, PoolingMode::Mean),
    ] {
        let normalizes = true;
        assert_eq!(
            read(&modules, config).unwrap(),
            Some(Pooling { mode, normalizes })
        );
    }
    for (config, reason) in [
        (r#"{"pooling_mode_max_tokens":true}"#, "pooling_mode 'max'"),
        (
            r#"{"pooling_mode_max_tokens":true,"pooling_mode_mean_tokens":true}"#,
            "pooling_mode 'max and mean'",
        ),
        ("[]", "is no config of a pooling"),
    ] {
        let error = read(&modules, config).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    let dense = modules.replace("models.Normalize", "models.Dense");
    let error = read(&dense, r#"{"pooling_mode":"mean"}"#).unwrap_err();
    assert!(error.contains("models.Dense"), "{error}");
    assert_eq!(Pooling::of_model(&fixture("bert")).unwrap(), None);
    // The first token's hidden state, as it is.
    let pooling = Pooling {
        mode: PoolingMode::Cls,
        normalizes: false,
    };
    let hidden = &expected("sentences")["hidden"];
    let first = pooling.pool(hidden, &[8, 5, 7, 3]).unwrap();
    assert_eq!(flat(&first), flat(&hidden.narrow(1, 0, 1).unwrap()));
}

/// The mean is over all targets, or sentences, of a step, however they are cut into batches; and so is what was seen of tokens.
#[test]
fn accumulated_batches_are_one_large_batch() {
    for (name, lines, objective) in [
        ("bert", labelled("bert"), Objective::Masked(None)),
        ("roberta", unlabelled(), Objective::Masked(Some(masking()))),
        ("sentences", defined(), teach(TeachLoss::Cosine)),
    ] {
        let whole = lines.lines().count();
        let run = |batch_size: usize, accumulate: usize, steps: Option<u64>| {
            let options = TrainOptions {
                objective: Some(objective.clone()),
                steps,
                batch_size,
                accumulate,
                lr: 0.01,
                shuffle: true,
                ..TrainOptions::default()
            };
            let mut trainer = trainer(name, &lines, options).unwrap();
            let count = trainer.total_steps();
            let steps: Vec<_> = (0..count).map(|_| trainer.step().unwrap()).collect();
            let rows = trainer.model().embedding().rows().unwrap().to_f32_vec();
            (steps, rows, trainer.activity().to_vec())
        };
        // One example at a time, and in one pass all but one and that one.
        for (batch_size, accumulate, steps) in [(1, whole, Some(4)), (whole - 1, 2, None)] {
            let (others, accumulated, same) = run(batch_size, accumulate, steps);
            let (steps, rows, activity) = run(whole, 1, steps);
            assert_eq!((others.len(), &same), (steps.len(), &activity), "{name}");
            for (one, other) in steps.iter().zip(&others) {
                assert_eq!(one.tokens, other.tokens, "{name}");
                assert!((one.loss - other.loss).abs() < 1e-6, "{name}: {one:?} {other:?}");
                let relative = (one.grad_norm / other.grad_norm - 1.0).abs();
                assert!(relative < 1e-5, "{name}: {one:?} {other:?}");
            }
            assert_close(name, &accumulated, &rows, 1e-5);
        }
    }
}

/// A token that no example has is dead, though the tied head of BERT gives its row a gradient.
#[test]
fn rows_that_no_step_reaches_are_told() {
    let without = |lines: &str, id: u32| {
        let has = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            let ids = line["input_ids"].as_array().unwrap();
            ids.iter().any(|other| *other == id)
        };
        let kept = lines.lines().filter(|line| !has(line));
        kept.fold(String::new(), |text, line| text + line + "\n")
    };
    let objective = Objective::Masked(Some(masking()));
    let options = TrainOptions {
        objective: Some(objective),
        steps: Some(6),
        batch_size: 2,
        ..TrainOptions::default()
    };
    let mut trainer = trainer("bert", &without(&unlabelled(), 40), options).unwrap();
    (0..6).for_each(|_| assert!(trainer.step().unwrap().loss.is_finite()));
    let dead: Vec<_> = trainer
        .activity()
        .iter()
        .map(|it| (it.id.0, it.is_dead()))
        .collect();
    assert_eq!(dead, [(77, false), (12, false), (40, true)]);
}

/// Noted evaluations end a run and give its best rows back.
#[test]
fn the_best_rows_are_kept() {
    let options = TrainOptions {
        objective: Some(teach(TeachLoss::Cosine)),
        steps: Some(9),
        lr: 0.01,
        early_stopping: Some(EarlyStopping {
            patience: 2,
            min_delta: 0.0,
        }),
        keep_best: true,
        ..TrainOptions::default()
    };
    let mut trainer = trainer("sentences", &defined(), options).unwrap();
    let rows = |trainer: &Trainer| trainer.model().embedding().rows().unwrap();
    trainer.step().unwrap();
    let loss = trainer.evaluate(trainer.data()).unwrap().loss;
    assert!(trainer.record_evaluation(loss).unwrap());
    let best = rows(&trainer);
    for worse in [false, true] {
        assert!(!trainer.stops_early());
        trainer.step().unwrap();
        assert!(
            !trainer
                .record_evaluation(loss + 0.1 + f64::from(u8::from(worse)))
                .unwrap()
        );
    }
    assert!(trainer.stops_early() && !rows(&trainer).bits_eq(&best));
    trainer.restore_best().unwrap();
    assert!(rows(&trainer).bits_eq(&best));
    let again = trainer.evaluate(trainer.data()).unwrap().loss;
    assert_eq!(trainer.best_evaluation().unwrap().loss.to_bits(), loss.to_bits());
    // Definitions are embedded with the rows as they are.
    assert_eq!(again.to_bits(), loss.to_bits());
}

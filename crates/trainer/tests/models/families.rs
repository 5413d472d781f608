//! Small decoders of all families, against what transformers made of them (`ci/interop/decoders.py`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use serde_json::json;
use trainable_tokens_core::PaddingRule;
use trainable_tokens_format::Checkpoint;
use trainable_tokens_trainer::{
    ALL_LINEAR, Dataset, Decoder, GenerateOptions, LanguageModel, LoraOptions, TrainOptions, Trainer,
    Vocabulary, generate,
};

use crate::case::{check, flat, with_adapter};

fn decoders() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/transformers/decoders");
    let mut found: Vec<PathBuf> = dir
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    found.sort();
    assert!(found.len() >= 15, "{found:?}");
    found
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

fn load(dir: &Path, tokens: &[u32]) -> Decoder {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let padding = PaddingRule::NoLookupGradient;
    Decoder::load(&checkpoint, tokens, None, padding, DType::F32, &Device::Cpu).unwrap()
}

fn expected(dir: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

/// The tokens that a model appends greedily when it reads the whole text for each.
fn uncached(model: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let input = Tensor::from_slice(&text, (1, text.len()), &Device::Cpu).unwrap();
        let hidden = model.hidden(&model.embed(&input).unwrap()).unwrap();
        let last = hidden.narrow(1, text.len() - 1, 1).unwrap();
        let logits = model.logits(&last).unwrap();
        let next = logits.argmax(D::Minus1).unwrap().flatten_all().unwrap();
        text.extend(next.to_vec1::<u32>().unwrap());
    }
    text.split_off(prompt.len())
}

#[test]
fn embeddings_and_logits_are_transformers() {
    for dir in decoders() {
        let (model, expected) = (load(&dir, &[7, 40]), expected(&dir));
        let embeddings = model.embed(&expected["input_ids"]).unwrap();
        let logits = model.logits(&model.hidden(&embeddings).unwrap()).unwrap();
        let compare = |what: &str, ours: &Tensor, atol: f64| {
            let what = format!("{}: {what}", name(&dir));
            check(
                &what,
                &flat(ours),
                &flat(&expected[what.rsplit(' ').next().unwrap()]),
                [atol, 0.0],
            );
        };
        compare("embeddings", &embeddings, 0.0);
        let largest = flat(&expected["logits"])
            .iter()
            .fold(0f32, |most, x| most.max(x.abs()));
        compare("logits", &logits, 1e-5 * f64::from(largest));
        // A shorter text is rotated otherwise.
        if let Some(theirs) = expected.get("prompt_logits") {
            let prompt = model.embed(&expected["prompt"].unsqueeze(0).unwrap()).unwrap();
            let logits = model.logits(&model.hidden(&prompt).unwrap()).unwrap();
            compare("prompt_logits", &logits, 1e-5 * f64::from(largest));
            assert_eq!(logits.dims(), theirs.dims());
        }
    }
}

#[test]
fn greedy_tokens_are_transformers_with_and_without_a_cache() {
    for dir in decoders() {
        let (model, expected) = (load(&dir, &[]), expected(&dir));
        let (prompt, theirs) = (ids(&expected["prompt"]), ids(&expected["generated"]));
        let options = GenerateOptions {
            max_new_tokens: theirs.len(),
            ..GenerateOptions::default()
        };
        let ours = generate(&model, &prompt, &options).unwrap();
        assert!(!ours.ended);
        assert_eq!(ours.token_ids, theirs, "{}", name(&dir));
        assert_eq!(uncached(&model, &prompt, theirs.len()), theirs, "{}", name(&dir));
    }
}

/// Hidden states of a text that is read in parts are those of the whole.
#[test]
fn a_cache_changes_nothing() {
    for dir in decoders() {
        let (model, expected) = (load(&dir, &[]), expected(&dir));
        let embeddings = model.embed(&expected["input_ids"]).unwrap();
        let length = embeddings.dim(1).unwrap();
        let mut cache = model.new_cache();
        let parts = [(0, 6), (6, 1), (7, 5), (12, length - 12)].map(|(start, count)| {
            let part = embeddings.narrow(1, start, count).unwrap();
            model.hidden_after(&mut cache, &part).unwrap()
        });
        assert_eq!(cache.length(), length);
        // These rotary embeddings depend on how long the text is so far.
        if ["llama-dynamic", "llama-longrope"].contains(&&*name(&dir)) {
            continue;
        }
        let whole = flat(&model.hidden(&embeddings).unwrap());
        let parts = flat(&Tensor::cat(&parts, 1).unwrap());
        check(&name(&dir), &parts, &whole, [1e-5, 1e-5]);
    }
}

#[test]
fn a_text_ends_at_its_end_and_at_the_models_positions() {
    let dir = decoders().into_iter().find(|dir| name(dir) == "gemma2").unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "config.json"] {
        std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
    }
    let expected = expected(&dir);
    let (prompt, all) = (ids(&expected["prompt"]), ids(&expected["generated"]));
    let options = GenerateOptions {
        max_new_tokens: all.len(),
        ..GenerateOptions::default()
    };
    let end = all[3];
    let before = all.iter().position(|id| *id == end).unwrap();
    for ends in [json!(end), json!([1, end])] {
        let generation = json!({ "eos_token_id": ends }).to_string();
        std::fs::write(copy.path().join("generation_config.json"), generation).unwrap();
        let ours = generate(&load(copy.path(), &[]), &prompt, &options).unwrap();
        assert!(ours.ended);
        assert_eq!(ours.token_ids, all[..before]);
    }
    let model = load(&dir, &[]);
    let room = model.config().max_length() - prompt.len();
    let options = GenerateOptions {
        max_new_tokens: 1000,
        ..options
    };
    assert_eq!(generate(&model, &prompt, &options).unwrap().token_ids.len(), room);
    for prompt in [vec![], vec![5; model.config().max_length() + 1]] {
        let error = generate(&model, &prompt, &options).unwrap_err();
        assert!(error.to_string().contains("a prompt of"), "{error}");
    }
}

#[test]
fn draws_are_repeated_by_their_seed_and_see_the_trained_rows() {
    let dir = decoders().into_iter().find(|dir| name(dir) == "gemma3").unwrap();
    let mut model = load(&dir, &[7, 40]);
    let prompt = ids(&expected(&dir)["prompt"]);
    let run = |model: &Decoder, seed: u64, top_p: f64| {
        let options = GenerateOptions {
            max_new_tokens: 12,
            temperature: 1.0,
            top_p,
            seed,
        };
        generate(model, &prompt, &options).unwrap().token_ids
    };
    assert_eq!(run(&model, 3, 0.9), run(&model, 3, 0.9));
    assert_ne!(run(&model, 3, 0.9), run(&model, 4, 0.9));
    assert_eq!(run(&model, 3, 1e-9), uncached(&model, &prompt, 12));
    // A tied head whose rows for these tokens are long chooses one of them.
    let rows = model.embedding().rows().unwrap();
    let longer = rows.to_f64_vec().into_iter().map(|x| x * 1e3).collect();
    let longer = trainable_tokens_core::TokenRows::new::<f64>(longer, 2, rows.embedding_dim()).unwrap();
    model
        .embedding_mut()
        .set_rows(&longer.to_dtype(rows.dtype()))
        .unwrap();
    let greedy = run(&model, 0, 0.0);
    assert!(greedy.iter().any(|id| [7, 40].contains(id)), "{greedy:?}");
    assert_ne!(greedy, uncached(&load(&dir, &[]), &prompt, 12));
}

/// Rows and weights of LoRA on all linear layers of every family: a no-op at first, with the gradient of the loss.
#[test]
fn rows_and_weights_of_lora_train_in_every_family() {
    let work = tempfile::tempdir().unwrap();
    let data = work.path().join("data.jsonl");
    std::fs::write(
        &data,
        json!({ "input_ids": [7, 3, 40, 11, 7, 5, 40, 9, 30, 8] }).to_string(),
    )
    .unwrap();
    for dir in decoders() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let lora = LoraOptions {
            rank: 2,
            targets: vec![ALL_LINEAR.to_owned()],
            ..LoraOptions::default()
        };
        let start = lora.start(&checkpoint, &[7, 40], None).unwrap();
        let model = with_adapter(&checkpoint, &start);
        let per_layer = if name(&dir).starts_with("gpt2") { 4 } else { 7 };
        assert_eq!(model.low_rank().len(), 2 * per_layer, "{}", name(&dir));
        let input = &expected(&dir)["input_ids"];
        let logits = |model: &LanguageModel| {
            let embeddings = model.embed(input).unwrap().detach();
            let hidden = model.hidden(&embeddings, input, None).unwrap();
            flat(&model.logits(&hidden).unwrap())
        };
        assert_eq!(
            logits(&model),
            logits(&load(&dir, &[]).into()),
            "{}: not a no-op",
            name(&dir)
        );
        let read = Dataset::read(&data, &Vocabulary::of_model(&dir), model.input_spec(), None).unwrap();
        let options = TrainOptions {
            steps: Some(5),
            lr: 0.01,
            ..TrainOptions::default()
        };
        let mut trainer = Trainer::new(model, read, options).unwrap();
        trainer
            .check_gradient()
            .unwrap_or_else(|error| panic!("{}: {error}", name(&dir)));
        let losses: Vec<f64> = (0..5).map(|_| trainer.step().unwrap().loss).collect();
        assert!(losses[4] < losses[0], "{}: {losses:?}", name(&dir));
        assert_eq!(trainer.largest_base_change(&checkpoint).unwrap().to_bits(), 0);
    }
}

/// The Hub's `gpt2` is stored without the first part of the names, and with the masks of its attention.
#[test]
fn a_base_model_alone_is_the_same_model() {
    let padding = PaddingRule::NoLookupGradient;
    let load = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        Decoder::load(&checkpoint, &[5, 3], None, padding, DType::F32, &Device::Cpu)
    };
    let logits = |model: &Decoder| {
        let ids = Tensor::new(&[[1u32, 5, 3, 7]], &Device::Cpu).unwrap();
        let hidden = model.hidden(&model.embed(&ids).unwrap()).unwrap();
        let logits = model.logits(&hidden).unwrap().flatten_all().unwrap();
        logits.to_vec1::<f32>().unwrap()
    };
    for dir in decoders() {
        let bare = tempfile::tempdir().unwrap();
        std::fs::copy(dir.join("config.json"), bare.path().join("config.json")).unwrap();
        let shards = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let shards = shards.filter(|path| {
            let is_tensors = path.extension().is_some_and(|it| it == "safetensors");
            is_tensors && name(path).starts_with("model")
        });
        let tensors = shards.flat_map(|path| candle_core::safetensors::load(path, &Device::Cpu).unwrap());
        let stripped = tensors.map(|(name, tensor)| {
            let bare = ["transformer.", "model."].map(|prefix| name.strip_prefix(prefix));
            let name = bare.into_iter().flatten().next().unwrap_or(&name).to_owned();
            (name, tensor)
        });
        let mut stripped: HashMap<String, Tensor> = stripped.collect();
        let mask = Tensor::zeros((1, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        stripped.insert("h.0.attn.bias".to_owned(), mask);
        let path = bare.path().join("model.safetensors");
        candle_core::safetensors::save(&stripped, &path).unwrap();
        let (whole, alone) = (load(&dir).unwrap(), load(bare.path()).unwrap());
        assert_eq!(whole.num_parameters(), alone.num_parameters(), "{}", name(&dir));
        let bits = |model: &Decoder| logits(model).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&whole), bits(&alone), "{}", name(&dir));
        if stripped.remove("lm_head.weight").is_some() {
            candle_core::safetensors::save(&stripped, path).unwrap();
            let message = load(bare.path()).unwrap_err().to_string();
            assert!(message.contains("no tensor lm_head.weight"), "{message}");
        }
    }
}

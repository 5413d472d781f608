//! The gradient check where a row starts as zeros.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::json;
use trainable_tokens_core::{EmbeddingSource, PaddingRule, TokenId, TokenRows};
use trainable_tokens_format::Checkpoint;
use trainable_tokens_testkit::peft::fixtures;
use trainable_tokens_trainer::{
    ALL_LINEAR, Architecture, Dataset, LanguageModel, LoraOptions, TrainOptions, Trainer, Vocabulary,
};

/// The tokens that train; the first one's row is zeros.
const TOKENS: [u32; 2] = [7, 40];

fn models() -> Vec<PathBuf> {
    let of_peft = ["llama_tied", "llama_untied", "gpt2_tied", "gemma2_tied"];
    let of_peft = of_peft.map(|name| fixtures().join(name).join("base"));
    let decoders = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/transformers/decoders");
    let decoders = ["llama", "qwen3", "gemma3"].map(|name| decoders.join(name));
    of_peft.into_iter().chain(decoders).collect()
}

fn rows(checkpoint: &Checkpoint, config: &Architecture) -> TokenRows {
    let table = format!("{}.weight", config.embedding_module(checkpoint));
    let rows = checkpoint
        .table(&table)
        .unwrap()
        .read_rows(&TOKENS.map(TokenId))
        .unwrap();
    let (mut values, dim) = (rows.to_f64_vec(), rows.embedding_dim());
    values[..dim].fill(0.0);
    TokenRows::new::<f64>(values, TOKENS.len(), dim)
        .unwrap()
        .to_dtype(rows.dtype())
}

/// A text whose first token sees only itself takes a row of zeros through all layers; the check still sees a sound gradient,
/// and leaves the row as it is.
#[test]
fn a_sound_gradient_of_a_row_of_zeros_passes() {
    let work = tempfile::tempdir().unwrap();
    let data = work.path().join("data.jsonl");
    for dir in models() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let config = Architecture::read(&checkpoint.config_path()).unwrap();
        let rows = rows(&checkpoint, &config);
        for ids in [&[7, 3, 40, 11, 5][..], &[7, 7, 7], &[9, 40, 7]] {
            std::fs::write(&data, json!({ "input_ids": ids }).to_string()).unwrap();
            for (seed, lora) in [(0, false), (1, false), (0, true), (1, true)] {
                let options = LoraOptions {
                    rank: 2,
                    targets: vec![ALL_LINEAR.to_owned()],
                    seed,
                    ..LoraOptions::default()
                };
                let padding = PaddingRule::NoLookupGradient;
                let model = if lora {
                    let start = options.start(&checkpoint, &TOKENS, Some(&rows)).unwrap();
                    LanguageModel::load_adapter(&checkpoint, &start, padding, DType::F32, &Device::Cpu)
                } else {
                    LanguageModel::load(
                        &checkpoint,
                        &TOKENS,
                        Some(&rows),
                        padding,
                        DType::F32,
                        &Device::Cpu,
                    )
                };
                let read = Dataset::read(&data, &Vocabulary::of_model(&dir), &config, None).unwrap();
                let options = TrainOptions {
                    seed,
                    ..TrainOptions::default()
                };
                let mut trainer = Trainer::new(model.unwrap(), read, options).unwrap();
                let what = format!("{}, {ids:?}, LoRA {lora}, seed {seed}", dir.display());
                let check = trainer
                    .check_gradient()
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(check.relative_error < 0.1, "{what}: {check:?}");
                let after = trainer.model().embedding().rows().unwrap();
                assert!(after.bits_eq(&rows.to_dtype(after.dtype())), "{what}");
            }
        }
    }
}

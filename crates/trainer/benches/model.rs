//! Training steps of a whole model: their time, how much of it matrix products take, and the memory that they add.
//!
//! ```text
//! cargo bench -p trainable-tokens-trainer --bench model -- --make llama --model target/llama-256k --token-ids 255000-255015
//! ```
//!
//! prints one JSON object. `--make llama|gemma2` writes a model of that shape with random weights, unless the directory
//! is there. `--input-ids FILE` names a JSON file with the batch, a list of equally long lists of token ids; without it a
//! batch of 2 x 128 random ids is made, of which every eighth trains. `--steps N` steps are timed after one to warm up;
//! `--lr`, `--recompute`, `--chunk-mib N` (of logits at once), `--dtype f32|bf16` and `--device cpu|cuda` set up the run.
//!
//! - `step_s` is the median of the steps' times.
//! - `gemm_share` is the time of the step's matrix products relative to `step_s`. Each product of the step is run by
//!   itself afterwards in this process, through the same routine, with operands of its size (the head's with a part of the
//!   vocabulary, and scaled), and the medians are summed. Only on the CPU; in `f32`.
//! - `extra_mb` is the peak of the process's anonymous memory, or of all memory in use on the GPU, read every 2 ms, above its
//!   level before the first step.
//! - `loss` holds the loss of each step before its update, the one to warm up first.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "model/checkpoint.rs"]
mod checkpoint;
#[path = "../../../benches/support/memory.rs"]
mod memory;
#[path = "model/options.rs"]
mod options;
#[path = "model/products.rs"]
mod products;

use std::io::Write as _;

use memory::Peak;
use options::Options;
use serde_json::{Value, json};
use trainable_tokens_core::PaddingRule;
use trainable_tokens_format::Checkpoint;
use trainable_tokens_trainer::{Dataset, Decoder, TrainOptions, Trainer, Vocabulary};

fn main() {
    let options = Options::of_program();
    if let Some(shape) = options.make {
        checkpoint::write(shape, &options.model);
    }
    let checkpoint = Checkpoint::open(&options.model).unwrap();
    let model = Decoder::load(
        &checkpoint,
        &options.token_ids,
        None,
        PaddingRule::NoLookupGradient,
        options.dtype,
        &options.device,
    )
    .unwrap();
    let config = model.config().clone();
    let batch = options.batch(config.vocab_size);
    let mut lines = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
    for input_ids in &batch {
        writeln!(lines, "{}", json!({ "input_ids": input_ids })).unwrap();
    }
    let data = Dataset::read(lines.path(), &Vocabulary::of_model(&options.model), &config, None).unwrap();
    let train = TrainOptions {
        steps: Some(options.steps + 1),
        batch_size: batch.len(),
        lr: options.lr,
        recompute: options.recompute,
        ..TrainOptions::default()
    };
    let model = model.with_logits_chunk(options.logits_chunk);
    let mut trainer = Trainer::new(model, data, train).unwrap();

    let memory = Peak::watch(&options.device);
    let metrics: Vec<_> = (0..=options.steps).map(|_| trainer.step().unwrap()).collect();
    let extra_bytes = memory.stop();
    let step_s = median(metrics[1..].iter().map(|step| step.seconds).collect());
    let gemm_share = if options.device.is_cpu() {
        json!(products::seconds(&config, batch.len(), batch[0].len()) / step_s)
    } else {
        Value::Null
    };
    let report = json!({
        "system": "trainable-tokens",
        "v": config.vocab_size,
        "d": config.hidden_size,
        "step_s": step_s,
        "extra_mb": extra_bytes >> 20,
        "gemm_share": gemm_share,
        "loss": metrics.iter().map(|step| step.loss).collect::<Vec<_>>(),
    });
    println!("{report}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

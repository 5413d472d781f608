//! What a training step allocates: nothing of the size of the vocabulary but one chunk of logits.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use trainable_tokens_core::{LogitsChunk, PaddingRule};
use trainable_tokens_format::Checkpoint;
use trainable_tokens_testkit::{Allocated, CountingAllocator, allocated};
use trainable_tokens_trainer::{Dataset, Decoder, Graph, TrainOptions, Trainer, Vocabulary, token_loss};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;
/// Tests of one binary run side by side, but only one may measure.
static MEASURING: Mutex<()> = Mutex::new(());

const VOCAB: usize = 20_000;
const HIDDEN: usize = 64;
const INNER: usize = 96;
const LAYERS: usize = 8;
const ROWS: usize = 2;
const LENGTH: usize = 40;
/// Rows of logits at a time.
const CHUNK: usize = 8;
/// Room for the small things of a step: plans, lists of ids, workspaces of products, widened rows of a table.
const REST: usize = 1 << 20;

fn noise(shape: &[usize], seed: usize) -> Tensor {
    let value = |at: usize| ((at * 31 + seed * 17) % 101) as f32 / 1000.0 - 0.05;
    let values = (0..shape.iter().product()).map(value);
    let tensor = Tensor::from_iter(values, &Device::Cpu).unwrap();
    tensor.reshape(shape).unwrap()
}

fn write_model(dir: &Path, is_tied: bool) {
    let config = json!({
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": is_tied,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm".to_owned(), vec![HIDDEN]),
    ];
    if !is_tied {
        shapes.push(("lm_head".to_owned(), vec![VOCAB, HIDDEN]));
    }
    for layer in 0..LAYERS {
        let modules = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ];
        shapes.extend(modules.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    let named = shapes.iter().enumerate();
    let tensors: HashMap<_, _> = named
        .map(|(seed, (name, shape))| (format!("{name}.weight"), noise(shape, seed)))
        .collect();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
}

fn trainer(dir: &Path, dtype: DType, recompute: bool) -> Trainer {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let padding = PaddingRule::NoLookupGradient;
    let model = Decoder::load(&checkpoint, &[7, 19_999, 3], None, padding, dtype, &Device::Cpu)
        .unwrap()
        .with_logits_chunk(LogitsChunk::rows(CHUNK).unwrap());
    let mut lines = String::new();
    for row in 0..ROWS {
        let ids: Vec<usize> = (0..LENGTH).map(|at| (at * 7919 + row * 7) % VOCAB).collect();
        writeln!(lines, "{}", json!({ "input_ids": ids })).unwrap();
    }
    let path = dir.join("data.jsonl");
    std::fs::write(&path, lines).unwrap();
    let data = Dataset::read(&path, &Vocabulary::of_model(dir), model.config(), None).unwrap();
    let options = TrainOptions {
        batch_size: ROWS,
        steps: Some(4),
        recompute,
        ..TrainOptions::default()
    };
    Trainer::new(model, data, options).unwrap()
}

/// What work costs once everything that it needs is there.
fn measure(what: &str, mut work: impl FnMut()) -> Allocated {
    work();
    let ((), cost) = allocated(work).unwrap();
    println!(
        "{what}: growth {} KiB, largest {} KiB",
        cost.growth >> 10,
        cost.largest >> 10
    );
    cost
}

#[test]
fn a_step_costs_the_batch_and_one_chunk_of_logits() {
    let _alone = MEASURING.lock();
    for is_tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), is_tied);
        for dtype in [DType::F32, DType::BF16] {
            let mut trainer = trainer(dir.path(), dtype, false);
            let what = format!("tied {is_tied}, {dtype:?}");
            let cost = measure(&what, || assert!(trainer.step().unwrap().loss > 0.0));
            // Logits are f32 in both types: less than the table, and than all logits.
            let chunk = CHUNK * VOCAB * 4;
            assert!(
                cost.largest <= chunk + REST,
                "{what}: one allocation of {} bytes",
                cost.largest
            );
            assert!(cost.largest < VOCAB * HIDDEN * dtype.size_in_bytes());
            // An activation of the widest layer, of which each layer keeps about a dozen.
            let activation = ROWS * LENGTH * INNER * 4;
            let most = chunk + 16 * LAYERS * activation + REST;
            assert!(cost.growth <= most, "{what}: {} bytes at once", cost.growth);
        }
    }
}

#[test]
fn recomputation_keeps_one_activation_of_a_layer() {
    let _alone = MEASURING.lock();
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), true);
    let [kept, recomputed] = [false, true].map(|recompute| {
        let trainer = trainer(dir.path(), DType::F32, recompute);
        // Large beside the workspace of a product.
        let embeddings = noise(&[8 * ROWS, LENGTH, HIDDEN], 1);
        let embeddings = candle_core::Var::from_tensor(&embeddings).unwrap();
        let what = format!("layers, recompute {recompute}");
        measure(&what, || {
            let model = trainer.model().as_decoder().unwrap();
            let hidden = model.hidden(&embeddings).unwrap();
            hidden.sum_all().unwrap().backward().unwrap();
        })
    });
    // All but one layer's activations are gone.
    assert!(
        recomputed.growth < kept.growth / 2,
        "{} bytes at once, {} without",
        recomputed.growth,
        kept.growth
    );
}

#[test]
fn evaluation_keeps_nothing() {
    let _alone = MEASURING.lock();
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), true);
    let trainer = trainer(dir.path(), DType::F32, false);
    let examples = Dataset::read(
        &dir.path().join("data.jsonl"),
        &Vocabulary::of_model(dir.path()),
        trainer.model().input_spec(),
        None,
    )
    .unwrap();
    let batch = examples.batch(&[0, 1]).unwrap();
    let cost = measure("evaluation", || {
        let loss = token_loss(trainer.model(), &batch, Graph::Drop).unwrap();
        assert!(!loss.track_op());
    });
    // One chunk of logits, and the activations of one layer that are in use at the same time.
    let activation = ROWS * LENGTH * INNER * 4;
    let most = CHUNK * VOCAB * 4 + 8 * activation + REST;
    assert!(cost.growth <= most, "{} bytes at once", cost.growth);
}

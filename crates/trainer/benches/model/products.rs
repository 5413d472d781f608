//! The matrix products of a training step, run by themselves.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainable_tokens_trainer::ModelConfig;

use crate::median;

/// How often each product is timed.
const RUNS: usize = 5;
/// Rows of the vocabulary that stand for all of it.
const HEAD_PART: usize = 16_000;

/// The time of all products of a step on `rows` examples of `length` tokens, each a target but the first.
pub(crate) fn seconds(config: &ModelConfig, rows: usize, length: usize) -> f64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let tokens = rows * length;
    let layer = 2.0 * linear(tokens, hidden, queries)
        + 2.0 * linear(tokens, hidden, keys)
        + 3.0 * linear(tokens, hidden, inner)
        + attention(config, rows, length);
    let part = HEAD_PART.min(config.vocab_size);
    let head = linear(rows * (length - 1), hidden, part) * config.vocab_size as f64 / part as f64;
    config.num_hidden_layers as f64 * layer + head
}

/// A projection and the gradient of its input.
fn linear(tokens: usize, input: usize, output: usize) -> f64 {
    let (x, weight, upstream) = (
        random(&[tokens, input]),
        random(&[output, input]),
        random(&[tokens, output]),
    );
    time(&x, &weight.t().unwrap()) + time(&upstream, &weight)
}

/// Scores, their mixture of values, and the gradients of both sides of both.
fn attention(config: &ModelConfig, rows: usize, length: usize) -> f64 {
    let (groups, dim) = (rows * config.num_key_value_heads, config.head_dim);
    let queries = config.num_attention_heads / config.num_key_value_heads * length;
    let (query, key) = (random(&[groups, queries, dim]), random(&[groups, length, dim]));
    let scores = random(&[groups, queries, length]);
    let (scores_t, key_t) = (scores.t().unwrap(), key.t().unwrap());
    2.0 * (time(&query, &key_t) + time(&scores, &key) + time(&scores_t, &query))
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap()
}

fn time(left: &Tensor, right: &Tensor) -> f64 {
    let run = |_| {
        let started = Instant::now();
        std::hint::black_box(left.matmul(right).unwrap());
        started.elapsed().as_secs_f64()
    };
    run(0);
    median((0..RUNS).map(run).collect())
}

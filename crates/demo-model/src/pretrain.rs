//! Pre-trains all weights on the corpus.

use std::{f64::consts::PI, fs, path::Path, time::Instant};

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    config, data,
    model::{EMBED, Model},
    text, tokenizer, weights,
};

/// Hyper-parameters of pre-training.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Passes over the corpus.
    #[arg(long, default_value_t = 10)]
    pub(crate) epochs: u32,
    /// Texts in a batch.
    #[arg(long, default_value_t = 32)]
    pub(crate) batch: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    pub(crate) lr: f64,
    /// Weight decay.
    #[arg(long, default_value_t = 0.1)]
    pub(crate) decay: f64,
}

/// Learning rate at `done` (of 1): a short warm-up, then half a cosine down to a fiftieth.
fn schedule(peak: f64, done: f64) -> f64 {
    let cosine = 0.02 + 0.98 * 0.5 * (1. + (PI * done).cos());
    peak * cosine * (done / 0.03).min(1.)
}

/// Trains on `text/train.txt` and saves the model under `dir`.
///
/// # Errors
///
/// Fails where a file cannot be read or written.
pub(crate) fn run(text_dir: &Path, dir: &Path, options: &Options, seed: u64) -> Result<()> {
    fs::create_dir_all(dir)?;
    let tokenizer = tokenizer::load(dir)?;
    let read = |name: &str| tokenizer::encode(&tokenizer, &text::lines(&text_dir.join(name))?, true);
    let (train, valid) = (read("train.txt")?, read("valid.txt")?);
    let tokens: usize = train.iter().map(Vec::len).sum();
    println!("{} texts, {tokens} tokens", train.len());

    let mut rng = StdRng::seed_from_u64(seed + 2);
    let rows = weights::normal(&[2, config::HIDDEN], &mut rng)?;
    let vars = weights::fresh(&mut rng)?;
    let weights = vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let model = Model::new(weights)?;
    let embed: Tensor = model.weight(EMBED)?.clone();
    let vars: Vec<_> = vars.into_values().collect();
    let params = ParamsAdamW {
        lr: options.lr,
        beta2: 0.99,
        weight_decay: options.decay,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(vars.clone(), params)?;

    let start = Instant::now();
    let mut step = 0u32;
    let per_epoch = u32::try_from(train.len().div_ceil(options.batch))?;
    let total = f64::from(per_epoch * options.epochs);
    for epoch in 1..=options.epochs {
        let mut mean = 0.;
        for batch in data::epoch(&train, options.batch, &mut rng)? {
            let loss = batch.loss(&model, &embed)?;
            mean += f64::from(loss.to_scalar::<f32>()?) / f64::from(per_epoch);
            let grads = loss.backward()?;
            optimizer.set_learning_rate(schedule(options.lr, f64::from(step) / total));
            optimizer.step(&grads)?;
            step += 1;
        }
        let valid = data::evaluate(&model, &embed, &valid)?;
        let time = start.elapsed().as_secs();
        println!("epoch {epoch:2}: step {step:5}, train {mean:.4}, valid {valid:.4}, {time} s");
    }
    model.save(&rows, dir)?;
    config::write(dir)
}

//! Trains the rows of the two new tokens alone and shows what changes.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result};
use candle_core::{D, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand::{SeedableRng, rngs::StdRng};
use tokenizers::Tokenizer;

use crate::{
    data,
    model::{EMBED, Model, linear},
    tokenizer::{self, EOS, VOCAB},
};

/// Hyper-parameters of the few-row training.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Optimizer steps.
    #[arg(long, default_value_t = 120)]
    pub(crate) steps: usize,
    /// Texts in a batch.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 0.02)]
    pub(crate) lr: f64,
    /// Most tokens generated for a prompt.
    #[arg(long, default_value_t = 24)]
    pub(crate) max_new: usize,
}

/// Texts of a `.jsonl` file.
fn texts(path: &Path) -> Result<Vec<String>> {
    let file = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let text = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line)?;
        Ok(value["text"].as_str().context("no text")?.to_owned())
    };
    file.lines().map(text).collect()
}

/// Continues each prompt greedily up to `</s>`.
fn generate(
    tokenizer: &Tokenizer,
    model: &Model,
    embed: &Tensor,
    prompts: &[String],
    max_new: usize,
) -> Result<()> {
    for (prompt, mut ids) in prompts.iter().zip(tokenizer::encode(tokenizer, prompts, false)?) {
        let start = ids.len();
        for _ in 0..max_new {
            let hidden = model.hidden(embed, &Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?)?;
            let last = hidden.narrow(0, ids.len() - 1, 1)?;
            let next = linear(&last, embed)?.argmax(D::Minus1)?.to_vec1::<u32>()?[0];
            if next == EOS {
                break;
            }
            ids.push(next);
        }
        println!("  {prompt} |{}", tokenizer::decode(tokenizer, &ids[start..])?);
    }
    Ok(())
}

/// Trains the two rows on the demo's texts.
///
/// # Errors
///
/// Fails where a file of the demo is missing.
pub(crate) fn run(dir: &Path, options: &Options, seed: u64) -> Result<()> {
    let model_dir = dir.join("model");
    let tokenizer = tokenizer::load(&model_dir)?;
    let model = Model::load(&model_dir)?;
    let read = |name: &str| tokenizer::encode(&tokenizer, &texts(&dir.join(name))?, false);
    let (train, heldout) = (read("train.jsonl")?, read("heldout.jsonl")?);
    let prompts: Vec<String> = serde_json::from_str(&fs::read_to_string(dir.join("prompts.json"))?)?;

    let frozen = model.weight(EMBED)?.narrow(0, 0, VOCAB - 2)?;
    let rows = Var::from_tensor(&model.weight(EMBED)?.narrow(0, VOCAB - 2, 2)?.copy()?)?;
    let embed = || Tensor::cat(&[&frozen, rows.as_tensor()], 0);
    let report = |when: &str| -> Result<()> {
        let embed = embed()?.detach();
        let (a, b) = (
            data::evaluate(&model, &embed, &train)?,
            data::evaluate(&model, &embed, &heldout)?,
        );
        println!("{when}: train loss {a:.6}, held-out loss {b:.6}");
        generate(&tokenizer, &model, &embed, &prompts, options.max_new)
    };

    report("before")?;
    let params = ParamsAdamW {
        lr: options.lr,
        weight_decay: 0.,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(vec![rows.clone()], params)?;
    let mut rng = StdRng::seed_from_u64(seed + 4);
    let start = Instant::now();
    let mut queue = Vec::new();
    for step in 1..=options.steps {
        if queue.is_empty() {
            queue = data::epoch(&train, options.batch, &mut rng)?;
        }
        let Some(batch) = queue.pop() else { break };
        let loss = batch.loss(&model, &embed()?)?;
        optimizer.backward_step(&loss)?;
        if step % 10 == 0 {
            println!("step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    println!(
        "{} steps in {:.1} s",
        options.steps,
        start.elapsed().as_secs_f64()
    );
    report("after")
}

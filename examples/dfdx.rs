//! Two rows of a dfdx embedding learn a target, with dfdx's own backward pass; then they are merged.
//!
//! `cargo run --example dfdx --features dfdx`

use dfdx::prelude::*;
use trainable_tokens::dfdx::TrainableTokens;
use trainable_tokens::format::{Adapter, Overwrite};
use trainable_tokens::{Adam, AdamConfig};

const VOCAB_SIZE: usize = 1000;
const DIM: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Cpu::default();
    let table: Vec<f32> = (0..VOCAB_SIZE * DIM)
        .map(|at| ((at / DIM * 31 + at % DIM * 7) % 13) as f32 / 13.0)
        .collect();
    let mut embedding = device.build_module::<Embedding<VOCAB_SIZE, DIM>, f32>();
    embedding.weight.copy_from(&table);

    let mut embedding = TrainableTokens::wrap(embedding, &[998, 999])?;
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.05,
        ..AdamConfig::ADAMW
    })?;

    let input_ids = device.tensor([3, 998, 5, 999, 998, 7]);
    for step in 0..=100 {
        let rows = embedding.try_forward(input_ids.leaky_trace())?;
        let loss = (rows - 0.25).square().mean();
        if step % 25 == 0 {
            println!("step {step:3}  loss {:.6}", loss.array());
        }
        embedding.step(&loss.backward(), &mut optimizer, &mut [])?;
    }

    let dir = std::env::temp_dir().join("trainable-tokens-example-dfdx");
    let adapter = Adapter::builder("model.embed_tokens", embedding.tokens(), embedding.rows()?).build()?;
    adapter.write(&dir, Overwrite::Replace)?;
    embedding.merge()?; // from here on a plain table serves the new rows
    println!("wrote {}", dir.display());
    Ok(())
}

//! Two rows of a candle embedding learn a target, with candle's own backward pass; then they are merged.
//!
//! `cargo run --example candle --features candle`

use candle_core::{DType, Device, Tensor};
use candle_nn::{Embedding, Module};
use trainable_tokens::candle::TrainableTokens;
use trainable_tokens::format::{Adapter, Overwrite};
use trainable_tokens::{Adam, AdamConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (vocab_size, dim) = (1000, 16);
    let device = Device::Cpu;
    let table: Vec<f32> = (0..vocab_size * dim)
        .map(|at| ((at / dim * 31 + at % dim * 7) % 13) as f32 / 13.0)
        .collect();
    let embedding = Embedding::new(Tensor::from_vec(table, (vocab_size, dim), &device)?, dim);

    let mut embedding = TrainableTokens::wrap(embedding, &[998, 999])?;
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.05,
        ..AdamConfig::ADAMW
    })?;

    let input_ids = Tensor::new(&[3u32, 998, 5, 999, 998, 7], &device)?;
    for step in 0..=100 {
        let loss = (embedding.forward(&input_ids)? - 0.25)?.sqr()?.mean_all()?;
        if step % 25 == 0 {
            println!(
                "step {step:3}  loss {:.6}",
                loss.to_dtype(DType::F64)?.to_scalar::<f64>()?
            );
        }
        embedding.step(&loss.backward()?, &mut optimizer, &mut [])?;
    }

    let dir = std::env::temp_dir().join("trainable-tokens-example-candle");
    let adapter = Adapter::builder("model.embed_tokens", &embedding.tokens(), embedding.rows()?).build()?;
    adapter.write(&dir, Overwrite::Replace)?;
    embedding.merge()?; // from here on a plain table serves the new rows
    println!("wrote {}", dir.display());
    Ok(())
}

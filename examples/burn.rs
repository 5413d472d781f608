//! Two rows of a burn embedding learn a target, with burn's own backward pass; then they are merged.
//!
//! `cargo run --example burn --features burn`

use burn::module::Param;
use burn::nn::EmbeddingConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use trainable_tokens::burn::{TrainableTokens, backward};
use trainable_tokens::format::{Adapter, Overwrite};
use trainable_tokens::{Adam, AdamConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (vocab_size, dim) = (1000, 16);
    let device = Device::flex().autodiff();
    let table: Vec<f32> = (0..vocab_size * dim)
        .map(|at| ((at / dim * 31 + at % dim * 7) % 13) as f32 / 13.0)
        .collect();
    let mut embedding = EmbeddingConfig::new(vocab_size, dim).init(&device);
    embedding.weight = Param::from_data(TensorData::new(table, [vocab_size, dim]), &device);

    let mut embedding = TrainableTokens::wrap(embedding, &[998, 999])?;
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.05,
        ..AdamConfig::ADAMW
    })?;

    let input_ids = Tensor::<2, Int>::from_data([[3, 998, 5, 999, 998, 7]], &device);
    for step in 0..=100 {
        let rows = embedding.forward(input_ids.clone());
        let loss = (rows - 0.25).powi_scalar(2).mean();
        if step % 25 == 0 {
            println!("step {step:3}  loss {:.6}", loss.clone().into_scalar::<f32>());
        }
        embedding.step(&backward(&loss)?, &mut optimizer, &mut [])?;
    }

    let dir = std::env::temp_dir().join("trainable-tokens-example-burn");
    let tokens = embedding.tokens()?;
    let adapter = Adapter::builder("model.embed_tokens", &tokens, embedding.rows()?).build()?;
    adapter.write(&dir, Overwrite::Replace)?;
    embedding.merge()?; // from here on a plain table serves the new rows
    println!("wrote {}", dir.display());
    Ok(())
}

//! Two rows of a table learn a target, with explicit gradients; then the rows go into an adapter that PEFT reads.
//!
//! `cargo run --example ndarray --features ndarray`

use ndarray::Array2;
use trainable_tokens::format::{Adapter, Overwrite};
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{Adam, AdamConfig, TokenSet};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (vocab_size, dim) = (1000, 16);
    let table = Array2::from_shape_fn((vocab_size, dim), |(row, column)| {
        ((row * 31 + column * 7) % 13) as f32 / 13.0
    });

    let tokens = TokenSet::new([998, 999], vocab_size)?;
    let mut embedding: TrainableTokens<_> = TrainableTokens::new(NdTable::new(table)?, tokens)?;
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.05,
        ..AdamConfig::ADAMW
    })?;

    let input_ids = [3, 998, 5, 999, 998, 7];
    for step in 0..=100 {
        let plan = embedding.plan(&input_ids)?;
        let rows: Array2<f32> = embedding.lookup_planned(&plan)?;
        // The loss is the mean square of (row - 0.25); its gradient is known.
        let error = rows - 0.25;
        if step % 25 == 0 {
            println!(
                "step {step:3}  loss {:.6}",
                error.mapv(|x| x * x).mean().unwrap_or(0.0)
            );
        }
        let upstream = &error * (2.0 / error.len() as f32);
        let gradient = embedding.backward(&plan, upstream.view())?;
        embedding.step(&gradient, &mut optimizer, &mut [])?;
    }

    let dir = std::env::temp_dir().join("trainable-tokens-example-ndarray");
    let adapter = Adapter::builder("model.embed_tokens", embedding.tokens(), embedding.rows()?).build()?;
    adapter.write(&dir, Overwrite::Replace)?;
    println!("wrote {}", dir.display());
    Ok(())
}

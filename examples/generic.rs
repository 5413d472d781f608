//! One training function over core's traits, run in whichever backends are enabled.
//!
//! `cargo run --example generic --features ndarray,candle,burn,dfdx`

use trainable_tokens::{Adam, AdamConfig, Backend, LookupPlan, TokenRows, TokenSet, TrainableTokens};

const VOCAB_SIZE: usize = 1000;
const DIM: usize = 16;

/// Trains the rows of a layer; all that a framework adds is the loss of a batch and its gradients.
fn train<B: Backend>(
    mut layer: TrainableTokens<B>,
    loss: impl Fn(&TrainableTokens<B>, &LookupPlan) -> Result<(f32, B::Gradients), B::Error>,
) -> Result<TokenRows, B::Error> {
    let mut optimizer = Adam::new(AdamConfig {
        lr: 0.05,
        ..AdamConfig::ADAMW
    })?;
    let plan = layer.plan(&[3, 998, 5, 999, 998, 7])?;
    for step in 0..=100 {
        let (loss, gradients) = loss(&layer, &plan)?;
        if step % 25 == 0 {
            println!("step {step:3}  loss {loss:.6}");
        }
        layer.step(&gradients, &mut optimizer, &mut [])?;
    }
    layer.rows()
}

fn table() -> Vec<f32> {
    let value = |at: usize| ((at / DIM * 31 + at % DIM * 7) % 13) as f32 / 13.0;
    (0..VOCAB_SIZE * DIM).map(value).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tokens = TokenSet::new([998, 999], VOCAB_SIZE)?;
    let mut results: Vec<(&str, TokenRows)> = Vec::new();

    #[cfg(feature = "ndarray")]
    {
        use trainable_tokens::ndarray::{NdTable, Ndarray, TrainableTokensExt};
        println!("ndarray");
        let table = ndarray::Array2::from_shape_vec((VOCAB_SIZE, DIM), table())?;
        let layer = TrainableTokens::<Ndarray<_, f32>>::new(NdTable::new(table)?, tokens.clone())?;
        let rows = train(layer, |layer, plan| {
            let error = layer.lookup_planned(plan)? - 0.25;
            let upstream = &error * (2.0 / error.len() as f32);
            let loss = error.mapv(|x| x * x).mean().unwrap_or(0.0);
            Ok((loss, layer.backward(plan, upstream.view())?))
        })?;
        results.push(("ndarray", rows));
    }
    #[cfg(feature = "candle")]
    {
        use trainable_tokens::candle::{Candle, CandleTable};
        println!("candle");
        let table = candle_core::Tensor::from_vec(table(), (VOCAB_SIZE, DIM), &candle_core::Device::Cpu)?;
        let layer = TrainableTokens::<Candle>::new(CandleTable::new(table)?, tokens.clone())?;
        let rows = train(layer, |layer, plan| {
            let loss = (layer.lookup_planned(plan)? - 0.25)?.sqr()?.mean_all()?;
            Ok((loss.to_scalar()?, loss.backward()?))
        })?;
        results.push(("candle", rows));
    }
    #[cfg(feature = "burn")]
    {
        use burn::tensor::{Device, Tensor, TensorData};
        use trainable_tokens::burn::{Burn, BurnTable, backward};
        println!("burn");
        let data = TensorData::new(table(), [VOCAB_SIZE, DIM]);
        let table = Tensor::<2>::from_data(data, &Device::flex().autodiff());
        let layer = TrainableTokens::<Burn>::new(BurnTable::new(table)?, tokens.clone())?;
        let rows = train(layer, |layer, plan| {
            let loss = (layer.lookup_planned(plan)? - 0.25).powi_scalar(2).mean();
            Ok((loss.clone().into_scalar(), backward(&loss)?))
        })?;
        results.push(("burn", rows));
    }
    #[cfg(feature = "dfdx")]
    {
        use dfdx::prelude::{AsArray, Backward, Cpu, MeanTo, TensorFromVec};
        use trainable_tokens::dfdx::{Dfdx, DfdxTable};
        println!("dfdx");
        let table = Cpu::default().tensor_from_vec(table(), (VOCAB_SIZE, DIM));
        let layer = TrainableTokens::<Dfdx<f32>>::new(DfdxTable::new(table)?, tokens.clone())?;
        let rows = train(layer, |layer, plan| {
            let loss = (layer.lookup_planned(plan)? - 0.25).square().mean();
            Ok((loss.array(), loss.backward()))
        })?;
        results.push(("dfdx", rows));
    }

    for (name, rows) in &results {
        let largest = rows
            .to_f64_vec()
            .iter()
            .map(|x| (x - 0.25).abs())
            .fold(0.0, f64::max);
        println!(
            "{name}: {} rows of {}, at most {largest:.4} off the target",
            rows.num_rows(),
            rows.dtype()
        );
    }
    if tokens.is_empty() || results.is_empty() {
        println!("no backend is enabled: --features ndarray,candle,burn,dfdx");
    }
    Ok(())
}

//! The run, written once over core's traits.

use std::path::Path;

use trainable_tokens::format::{Adapter, Overwrite, TrainingState, digest, write_dir_atomically};
use trainable_tokens::{
    Adam, AdamConfig, DType, EmbeddingSource, LookupPlan, RowOptimizer, Sgd, SgdConfig, TokenRows, TokenSet,
};
use trainable_tokens_testkit::{Gradients, Harness, Layer};

use super::noise::noise;

/// Steps of a run.
pub(crate) const STEPS: usize = 50;
const VOCABULARY: usize = 40;
const DIM: usize = 8;
const MODULE: &str = "model.embed_tokens";
/// In no order, both edges of the vocabulary among them.
const TOKENS: [u32; 4] = [39, 0, 17, 5];

/// A framework's part of the model: `cross_entropy(head(embedding(ids) · projection), targets)`, averaged.
pub(crate) trait Model: Harness {
    /// The loss of a batch and the framework's gradients.
    fn loss(
        layer: &Layer<Self>,
        projection: &TokenRows,
        plan: &LookupPlan,
        targets: &[u32],
    ) -> (f64, Gradients<Self>);
}

/// What happened in a run, from its first step on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub(crate) losses: Vec<f64>,
    pub(crate) gradients: Vec<TokenRows>,
    pub(crate) rows: Vec<TokenRows>,
    pub(crate) base_unchanged: bool,
}

impl Run {
    /// Its steps from `step` on.
    pub(crate) fn after(&self, step: usize) -> Self {
        Self {
            losses: self.losses[step..].to_vec(),
            gradients: self.gradients[step..].to_vec(),
            rows: self.rows[step..].to_vec(),
            base_unchanged: self.base_unchanged,
        }
    }
}

/// Where a run starts: the rows, in the tokens' order.
pub(crate) struct Start {
    tokens: Vec<u32>,
    rows: Option<TokenRows>,
}

impl Start {
    /// From the base's own rows.
    fn fresh() -> Self {
        Self {
            tokens: TOKENS.to_vec(),
            rows: None,
        }
    }

    /// From the files of another run, whose memory `optimizer` takes over.
    pub(crate) fn load(dir: &Path, optimizer: &mut dyn RowOptimizer) -> Self {
        let dir = dir.join("adapter");
        let adapter = Adapter::read(&dir).unwrap();
        let state = TrainingState::read(dir.join(TrainingState::FILE_NAME)).unwrap();
        optimizer.load_state(state.optimizer).unwrap();
        Self {
            tokens: adapter.modules()[0].token_indices().to_vec(),
            rows: adapter.rows(MODULE).cloned(),
        }
    }
}

type NewOptimizer = fn() -> Box<dyn RowOptimizer>;

/// Every update rule.
pub(crate) fn optimizers() -> [(&'static str, NewOptimizer); 5] {
    fn sgd(momentum: f64, nesterov: bool) -> Box<dyn RowOptimizer> {
        let config = SgdConfig {
            lr: 0.3,
            momentum,
            nesterov,
            ..SgdConfig::default()
        };
        Box::new(Sgd::new(config).unwrap())
    }
    fn adam(config: AdamConfig) -> Box<dyn RowOptimizer> {
        Box::new(Adam::new(AdamConfig { lr: 0.05, ..config }).unwrap())
    }
    [
        ("sgd", || sgd(0.0, false)),
        ("sgd with Nesterov's momentum", || sgd(0.9, true)),
        ("adam", || adam(AdamConfig::ADAM)),
        ("adamw", || {
            adam(AdamConfig {
                weight_decay: 0.01,
                ..AdamConfig::ADAMW
            })
        }),
        ("amsgrad", || {
            adam(AdamConfig {
                amsgrad: true,
                ..AdamConfig::ADAM
            })
        }),
    ]
}

/// Ids and targets of a step: trainable tokens among both.
fn batch(step: usize) -> (Vec<u32>, Vec<u32>) {
    let at = |i: usize, factor: usize| {
        if i.is_multiple_of(3) {
            TOKENS[(i / 3 + step) % TOKENS.len()]
        } else {
            u32::try_from((i * factor + step * 5) % VOCABULARY).unwrap()
        }
    };
    (0..12).map(|i| (at(i, 7), at(i + 1, 11))).unzip()
}

fn layer<M: Model>(start: &Start) -> Layer<M> {
    let source = M::source(&noise(1, DType::F32, VOCABULARY, DIM)).unwrap();
    let tokens = TokenSet::new(start.tokens.iter().copied(), VOCABULARY).unwrap();
    match &start.rows {
        None => Layer::<M>::new(source, tokens).unwrap(),
        Some(rows) => Layer::<M>::with_rows(source, tokens, rows).unwrap(),
    }
}

fn steps<M: Model>(layer: &mut Layer<M>, optimizer: &mut dyn RowOptimizer, from: usize, to: usize) -> Run {
    let projection = noise(2, DType::F32, DIM, DIM);
    let before = digest(layer.source()).unwrap();
    let mut run = Run::default();
    for step in from..to {
        let (ids, targets) = batch(step);
        let plan = layer.plan(&ids).unwrap();
        let (loss, gradients) = M::loss(layer, &projection, &plan, &targets);
        run.losses.push(loss);
        run.gradients.push(layer.gradient(&gradients).unwrap());
        layer.step(&gradients, optimizer, &mut []).unwrap();
        run.rows.push(layer.rows().unwrap());
    }
    run.base_unchanged = digest(layer.source()).unwrap() == before;
    run
}

/// A run from the base's own rows.
pub(crate) fn train<M: Model>(optimizer: &mut dyn RowOptimizer, to: usize) -> Run {
    train_from::<M>(&Start::fresh(), optimizer, 0, to)
}

/// A run from step `from` to step `to`.
pub(crate) fn train_from<M: Model>(
    start: &Start,
    optimizer: &mut dyn RowOptimizer,
    from: usize,
    to: usize,
) -> Run {
    steps::<M>(&mut layer::<M>(start), optimizer, from, to)
}

/// A run with given gradients.
pub(crate) fn replay<M: Model>(optimizer: &mut dyn RowOptimizer, gradients: &[TokenRows]) -> Run {
    let mut layer = layer::<M>(&Start::fresh());
    let mut run = Run::default();
    for gradient in gradients {
        layer.step_with(gradient.clone(), optimizer, &mut []).unwrap();
        run.rows.push(layer.rows().unwrap());
    }
    run
}

/// The rows of the first batch, before any step.
pub(crate) fn embedded<M: Model>() -> TokenRows {
    M::read(&layer::<M>(&Start::fresh()).lookup(&batch(0).0).unwrap()).unwrap()
}

/// Trains and saves adapter and training state.
pub(crate) fn save<M: Model>(optimizer: &mut dyn RowOptimizer, to: usize, dir: &Path) {
    let mut layer = layer::<M>(&Start::fresh());
    steps::<M>(&mut layer, optimizer, 0, to);
    write::<M>(&layer, optimizer, dir);
}

/// As [`save`], with given gradients.
pub(crate) fn save_replay<M: Model>(optimizer: &mut dyn RowOptimizer, gradients: &[TokenRows], dir: &Path) {
    let mut layer = layer::<M>(&Start::fresh());
    for gradient in gradients {
        layer.step_with(gradient.clone(), optimizer, &mut []).unwrap();
    }
    write::<M>(&layer, optimizer, dir);
}

fn write<M: Model>(layer: &Layer<M>, optimizer: &dyn RowOptimizer, dir: &Path) {
    let adapter = Adapter::builder(MODULE, layer.tokens(), layer.rows().unwrap())
        .tied("lm_head")
        .base(digest(layer.source()).unwrap(), DType::F32)
        .build()
        .unwrap();
    assert_eq!(layer.source().vocab_size(), VOCABULARY);
    let state = TrainingState {
        optimizer: optimizer.state(),
        extra: serde_json::Value::Null,
    };
    write_dir_atomically(dir.join("adapter"), Overwrite::Refuse, |dir| {
        adapter.write_into(dir)?;
        state.write_into(dir)
    })
    .unwrap();
}

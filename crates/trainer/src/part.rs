//! What trains: matrices, each with an optimizer of its own.

use candle_core::backprop::GradStore;
use trainable_tokens_candle::{Candle, CandleDelta};
use trainable_tokens_core::{
    Backend, ClipGradNorm, DecayTowardOriginal, DeltaStore, Error as CoreError, OptimizerHook,
    OptimizerState, RowOptimizer, TokenRows, TokenSet, joint_norm, step_delta,
};
use trainable_tokens_format::{Adapter, LoraWeights};

use crate::{Error, LanguageModel, Result, TrainOptions};

/// One trained matrix: rows of a table, or a factor of LoRA's.
pub(crate) struct Part {
    matrix: Matrix,
    /// Shares the model's variable.
    delta: CandleDelta,
    /// What hooks see as the tokens of the rows.
    tokens: TokenSet,
    optimizer: Box<dyn RowOptimizer>,
    decay: Option<DecayTowardOriginal>,
}

/// Which matrix of the model it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Matrix {
    /// The rows of the input embedding, at its path.
    Embedding(String),
    /// The rows of an untied head, at its path.
    Head(String),
    /// One of LoRA's factors of the layer at a path, with its scaling.
    Factor {
        path: String,
        /// [`LORA_A`] or [`LORA_B`].
        name: &'static str,
        scaling: f64,
    },
}

const LORA_A: &str = "lora_A";
const LORA_B: &str = "lora_B";

impl Matrix {
    /// Its name in a saved state; the input embedding's rows, which were there first, have none.
    fn name(&self) -> String {
        match self {
            Self::Embedding(_) => String::new(),
            Self::Head(module) => format!("{module}."),
            Self::Factor { path, name, .. } => format!("{path}.{name}."),
        }
    }

    pub(crate) fn is_embedding(&self) -> bool {
        matches!(self, Self::Embedding(_))
    }

    pub(crate) fn is_factor(&self) -> bool {
        matches!(self, Self::Factor { .. })
    }
}

/// All that trains in a model: the rows of the embedding, those of an untied head, and LoRA's factors.
pub(crate) fn parts(model: &LanguageModel, options: &TrainOptions) -> Result<Vec<Part>> {
    let mut found = Vec::new();
    let head = model.head_module().unwrap_or_default();
    let tables = [
        (
            Matrix::Embedding(model.embedding_module()),
            Some(model.embedding()),
        ),
        (Matrix::Head(head), model.head_rows()),
    ];
    for (matrix, layer) in tables {
        let Some(layer) = layer.filter(|layer| !layer.tokens().is_empty()) else {
            continue;
        };
        let delta = layer.layer().delta()?.clone();
        found.push((matrix, delta, layer.tokens().clone()));
    }
    for low_rank in model.low_rank() {
        for (name, delta) in [LORA_A, LORA_B].into_iter().zip(low_rank.factors()) {
            let rows = delta.num_rows();
            let tokens = TokenSet::new(0..u32::try_from(rows).unwrap_or(u32::MAX), rows)?;
            let matrix = Matrix::Factor {
                path: low_rank.path().to_owned(),
                name,
                scaling: low_rank.scaling(),
            };
            found.push((matrix, delta.clone(), tokens));
        }
    }
    let parts = found.into_iter().map(|(matrix, delta, tokens)| {
        Ok(Part {
            optimizer: options.build_optimizer()?,
            decay: options.build_decay(&delta.read()?)?,
            matrix,
            delta,
            tokens,
        })
    });
    parts.collect()
}

/// One step of all parts with a learning rate; the L2 norm of all gradients together, before they are clipped.
pub(crate) fn step(
    parts: &mut [Part],
    gradients: &GradStore,
    clip: Option<&ClipGradNorm>,
    learning_rate: f64,
) -> Result<f64> {
    let gradients = parts.iter().map(|part| part.gradient(gradients));
    let mut gradients = gradients.collect::<Result<Vec<_>>>()?;
    let norm = joint_norm(&gradients);
    if let Some(clip) = clip {
        clip.clip(&mut gradients.iter_mut().collect::<Vec<_>>());
    }
    for (part, gradient) in parts.iter_mut().zip(gradients) {
        part.optimizer.set_learning_rate(learning_rate);
        let mut hooks: Vec<&mut dyn OptimizerHook> = Vec::new();
        hooks.extend(part.decay.as_mut().map(|hook| hook as &mut dyn OptimizerHook));
        step_delta(
            &mut *part.optimizer,
            &mut hooks,
            &part.tokens,
            &mut part.delta,
            gradient,
        )?;
    }
    Ok(norm)
}

/// The optimizers' memories as one.
pub(crate) fn state(parts: &[Part]) -> OptimizerState {
    let mut all = OptimizerState::default();
    for part in parts {
        let state = part.optimizer.state();
        all.step = state.step;
        let name = part.matrix.name();
        let tensors = state
            .tensors
            .into_iter()
            .map(|(tensor, rows)| (format!("{name}{tensor}"), rows));
        all.tensors.extend(tensors);
    }
    all
}

/// Gives each optimizer its memory again, and each matrix its values. A state or an adapter that does not fit changes no
/// value.
pub(crate) fn load(parts: &mut [Part], mut state: OptimizerState, adapter: &Adapter) -> Result<()> {
    let lora = adapter.lora_weights()?;
    let values = parts.iter().map(|part| part.values(adapter, &lora));
    let values = values.collect::<Result<Vec<_>>>()?;
    // A longer name first: the embedding's is no prefix at all.
    for part in parts.iter_mut().rev() {
        let name = part.matrix.name();
        let own = |tensor: &str| {
            tensor
                .strip_prefix(&name)
                .filter(|rest| !rest.contains('.'))
                .map(str::to_owned)
        };
        let (mine, others) = state
            .tensors
            .into_iter()
            .partition::<Vec<_>, _>(|(tensor, _)| own(tensor).is_some());
        state.tensors = others;
        let tensors = mine
            .into_iter()
            .map(|(tensor, rows)| (own(&tensor).unwrap_or(tensor), rows));
        part.optimizer.load_state(OptimizerState {
            step: state.step,
            tensors: tensors.collect(),
        })?;
    }
    if let Some((name, _)) = state.tensors.into_iter().next() {
        let reason = "nothing that trains here has such a tensor".to_owned();
        return Err(CoreError::OptimizerState { name, reason }.into());
    }
    for (part, values) in parts.iter_mut().zip(values) {
        part.write(&values)?;
    }
    Ok(())
}

impl Part {
    pub(crate) fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// What it is, as messages and saved states call it: its name and shape.
    pub(crate) fn describe(&self) -> String {
        let [rows, columns] = [self.delta.num_rows(), self.delta.embedding_dim()];
        format!("{}{rows}x{columns}", self.matrix.name())
    }

    pub(crate) fn read(&self) -> Result<TokenRows> {
        Ok(self.delta.read()?)
    }

    pub(crate) fn write(&mut self, values: &TokenRows) -> Result<()> {
        Ok(self.delta.write(&values.to_dtype(self.delta.dtype()))?)
    }

    /// Its gradient after a backward pass.
    pub(crate) fn gradient(&self, gradients: &GradStore) -> Result<TokenRows> {
        let gradient = Candle::gradient(gradients, &self.delta)?;
        Ok(gradient.ok_or(CoreError::NoGradient)?)
    }

    /// Its values in an adapter.
    fn values(&self, adapter: &Adapter, lora: &[LoraWeights]) -> Result<TokenRows> {
        let refuse = |what: String| Err(Error::Setting(what));
        let rows = |module: &str| match adapter.rows(module) {
            Some(rows) => Ok(rows.clone()),
            None => refuse(format!("the adapter has no rows for {module}")),
        };
        match &self.matrix {
            Matrix::Embedding(module) | Matrix::Head(module) => rows(module),
            Matrix::Factor { path, name, scaling } => {
                let Some(weights) = lora.iter().find(|weights| weights.path() == path) else {
                    return refuse(format!("the adapter has no weights of LoRA for {path}"));
                };
                if weights.scaling() != *scaling {
                    return refuse(format!(
                        "the adapter scales its weights of LoRA for {path} by {}, not {scaling}",
                        weights.scaling()
                    ));
                }
                let [a, b] = weights.factors()?;
                Ok(if *name == LORA_A { a } else { b })
            }
        }
    }
}

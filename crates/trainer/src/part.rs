//! What trains: matrices, each with optimizers of its own.

mod group;

use candle_core::backprop::GradStore;
use sha2::{Digest, Sha256};
use trainable_tokens_candle::{Candle, CandleDelta};
use trainable_tokens_core::{
    Backend, ClipGradNorm, DeltaStore, Error as CoreError, OptimizerState, TokenId, TokenRows, TokenSet,
    joint_norm,
};
use trainable_tokens_format::{Adapter, LoraWeights};

use self::group::Groups;
use crate::digest::hex;
use crate::{Decoder, Error, LanguageModel, Result, TrainOptions};

/// One trained matrix: rows of a table, or a factor of LoRA's.
pub(crate) struct Part {
    matrix: Matrix,
    /// Shares the model's variable.
    delta: CandleDelta,
    groups: Groups,
}

/// Which matrix of the model it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Matrix {
    /// The rows of the input embedding, at its path.
    Embedding(String),
    /// The rows of an untied head, at its path.
    Head(&'static str),
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
    let mut found: Vec<Part> = Vec::new();
    let head = |decoder: &Decoder| Matrix::Head(decoder.config().head_module());
    let tables = [
        (
            Some(Matrix::Embedding(model.embedding_module())),
            Some(model.embedding()),
        ),
        (model.as_decoder().map(head), model.head_rows()),
    ];
    for (matrix, layer) in tables {
        let (Some(matrix), Some(layer)) = (matrix, layer.filter(|layer| !layer.tokens().is_empty())) else {
            continue;
        };
        let delta = layer.layer().delta()?.clone();
        let groups = Groups::of_tokens(&layer.tokens(), &delta.read()?, &*layer.table(), options)?;
        found.push(Part {
            matrix,
            delta,
            groups,
        });
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
            found.push(Part {
                matrix,
                delta: delta.clone(),
                groups: Groups::whole(tokens, &delta.read()?, options)?,
            });
        }
    }
    if found.iter().all(|part| part.groups.is_frozen()) && !found.is_empty() {
        return Err(Error::Setting(
            "nothing trains: every token has a learning rate of 0".to_owned(),
        ));
    }
    let trains = |id: u32| {
        let layers = [Some(model.embedding()), model.head_rows()];
        let mut layers = layers.into_iter().flatten();
        layers.any(|layer| layer.tokens().contains(TokenId(id)))
    };
    match options.token_lr.iter().find(|(id, _)| !trains(*id)) {
        None => Ok(found),
        Some((id, _)) => Err(Error::Setting(format!(
            "token id {id} has a learning rate of its own, but it does not train"
        ))),
    }
}

/// The gradient of each part after a backward pass; of frozen rows it is 0.
pub(crate) fn gradients(parts: &[Part], store: &GradStore) -> Result<Vec<TokenRows>> {
    let gradient = |part: &Part| part.groups.without_frozen(part.gradient(store)?);
    parts.iter().map(gradient).collect()
}

/// One step of all parts, their learning rates times `factor`; the L2 norm of all gradients together, before they are clipped.
pub(crate) fn step(
    parts: &mut [Part],
    mut gradients: Vec<TokenRows>,
    clip: Option<&ClipGradNorm>,
    factor: f64,
) -> Result<f64> {
    let norm = joint_norm(&gradients);
    if let Some(clip) = clip {
        clip.clip(&mut gradients.iter_mut().collect::<Vec<_>>());
    }
    for (part, mut gradient) in parts.iter_mut().zip(gradients) {
        let mut outcome = Ok(());
        part.delta.update(&mut |rows| {
            // An error is no reason to lose rows that were updated before it.
            outcome = part.groups.step(rows, &mut gradient, factor);
            Ok(())
        })?;
        outcome?;
    }
    Ok(norm)
}

/// The optimizers' memories as one.
pub(crate) fn state(parts: &[Part]) -> Result<OptimizerState> {
    let mut all = OptimizerState::default();
    for part in parts {
        let state = part.groups.state()?;
        all.step = all.step.max(state.step);
        let name = part.matrix.name();
        let tensors = state
            .tensors
            .into_iter()
            .map(|(tensor, rows)| (format!("{name}{tensor}"), rows));
        all.tensors.extend(tensors);
    }
    Ok(all)
}

/// The SHA-256 of the values of all parts, in hexadecimal: what a saved state belongs to.
pub(crate) fn digest(parts: &[Part], values: &[TokenRows]) -> String {
    let mut hash = Sha256::new();
    for (part, values) in parts.iter().zip(values) {
        hash.update(part.describe());
        hash.update(values.to_dtype(part.delta.dtype()).to_le_bytes());
    }
    hex(hash)
}

/// Gives each optimizer its memory again, and each matrix its values. A state or an adapter that does not fit changes no
/// value.
pub(crate) fn load(parts: &mut [Part], mut state: OptimizerState, adapter: &Adapter) -> Result<()> {
    let values = values(parts, adapter)?;
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
        part.groups.load_state(&OptimizerState {
            step: state.step,
            tensors: tensors.collect(),
        })?;
    }
    if let Some((name, _)) = state.tensors.into_iter().next() {
        let reason = "nothing that trains here has such a tensor".to_owned();
        return Err(CoreError::OptimizerState { name, reason }.into());
    }
    write_all(parts, &values)
}

/// Gives each matrix its values in an adapter.
pub(crate) fn load_values(parts: &mut [Part], adapter: &Adapter) -> Result<()> {
    let values = values(parts, adapter)?;
    write_all(parts, &values)
}

/// Gives each matrix its values.
pub(crate) fn write_all(parts: &mut [Part], values: &[TokenRows]) -> Result<()> {
    let mut pairs = parts.iter_mut().zip(values);
    pairs.try_for_each(|(part, values)| part.write(values))
}

/// The values of all parts in an adapter.
pub(crate) fn values(parts: &[Part], adapter: &Adapter) -> Result<Vec<TokenRows>> {
    let lora = adapter.lora_weights()?;
    parts.iter().map(|part| part.values(adapter, &lora)).collect()
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
            Matrix::Embedding(module) => rows(module),
            Matrix::Head(module) => rows(module),
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

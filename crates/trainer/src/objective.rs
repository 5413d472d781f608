//! What training minimises.

mod masking;
mod retrieval;
mod teach;

use std::fmt;

use candle_core::{Device, Tensor, Var};
pub use masking::{MaskTrainable, Masking};
pub use retrieval::Retrieval;
pub use teach::{Teach, TeachLoss};
use trainable_tokens_core::IGNORED_LABEL;

use self::teach::Definitions;
use crate::data::Predicts;
use crate::{Batch, Dataset, Error, Graph, LanguageModel, Result};

/// What training minimises. A [`Decoder`](crate::Decoder) has the first, an [`Encoder`](crate::Encoder) the others.
#[derive(Clone, Debug, PartialEq)]
pub enum Objective {
    /// Each token predicts the next one's label.
    Causal,
    /// Each token predicts its own label; the tokens of examples without labels are masked at random (Devlin et al. 2018).
    /// Without a masking, every example must have labels.
    Masked(Option<Masking>),
    /// The embedding of a sentence comes close to that of a definition.
    Teach(Teach),
}

impl Objective {
    /// What a model is trained for unless something else is asked for: the next token for a decoder, labels for an
    /// encoder.
    pub fn of_model(model: &LanguageModel) -> Self {
        match model {
            LanguageModel::Decoder(_) => Self::Causal,
            LanguageModel::Encoder(_) => Self::Masked(None),
        }
    }

    /// Refuses a model or data that it is not for.
    fn check(&self, model: &LanguageModel, data: &Dataset) -> Result<()> {
        let fits = match self {
            Self::Causal => model.as_decoder().is_some(),
            Self::Masked(_) | Self::Teach(_) => model.as_encoder().is_some(),
        };
        if !fits {
            let kind = model.as_decoder().map_or("an encoder", |_| "a decoder");
            let message = format!("the objective {} is not for {kind}", self.name());
            return Err(Error::Setting(message));
        }
        if let Self::Masked(Some(masking)) = self {
            masking.check(model.input_spec().vocab_size)?;
        }
        if let (Self::Teach(teach), Some(encoder)) = (self, model.as_encoder()) {
            teach.check(data)?;
            if let Some(weights) = encoder.low_rank_of_head() {
                return Err(Error::Setting(format!(
                    "module {} predicts tokens, so that the objective teach trains no weights of LoRA for it; name other \
                     targets",
                    weights.path()
                )));
            }
        }
        for (index, example) in data.examples().iter().enumerate() {
            let reason = match self {
                Self::Teach(_) if example.definition.is_none() => {
                    "has no definition, so that it teaches nothing".to_owned()
                }
                Self::Causal | Self::Masked(_) if example.definition.is_some() => {
                    format!(
                        "is a sentence with a definition, which the objective {} cannot use",
                        self.name()
                    )
                }
                Self::Masked(None) if example.labels.is_none() => {
                    "has no labels, and nothing says how its tokens are masked".to_owned()
                }
                _ => continue,
            };
            let (path, line) = (data.path_of(index).to_owned(), example.line);
            return Err(Error::Data { path, line, reason });
        }
        Ok(())
    }

    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Causal => "causal",
            Self::Masked(_) => "masked",
            Self::Teach(_) => "teach",
        }
    }
}

impl fmt::Display for Objective {
    /// Its name and settings, as a training state records them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name())?;
        match self {
            Self::Causal | Self::Masked(None) => Ok(()),
            Self::Masked(Some(masking)) => write!(f, " ({masking})"),
            Self::Teach(teach) => write!(f, " ({teach})"),
        }
    }
}

/// An objective, ready for a data set.
#[derive(Debug)]
pub(crate) struct Task {
    objective: Objective,
    definitions: Option<Definitions>,
}

impl Task {
    /// Checks that objective, model and data fit, and computes what is frozen: the embeddings of definitions are those
    /// of the model as it is now.
    pub(crate) fn new(objective: Objective, model: &LanguageModel, data: &Dataset) -> Result<Self> {
        objective.check(model, data)?;
        let definitions = match (&objective, model) {
            (Objective::Teach(teach), LanguageModel::Encoder(encoder)) => {
                Some(teach.definitions(encoder, data)?)
            }
            _ => None,
        };
        Ok(Self {
            objective,
            definitions,
        })
    }

    pub(crate) fn objective(&self) -> &Objective {
        &self.objective
    }

    /// The frozen embeddings of the definitions, and how they are made.
    pub(crate) fn taught(&self) -> Option<(&Teach, &Definitions)> {
        match &self.objective {
            Objective::Teach(teach) => Some((teach, self.definitions.as_ref()?)),
            Objective::Causal | Objective::Masked(_) => None,
        }
    }

    /// A batch with the example at `index` whose loss has a slope: a ranking needs two definitions.
    ///
    /// # Errors
    ///
    /// Those of [`batch`](Self::batch).
    pub(crate) fn probe(&self, model: &LanguageModel, data: &Dataset, index: usize) -> Result<Batch> {
        let own = |index: usize| data.examples().get(index).and_then(|it| it.definition);
        let other = (0..data.examples().len()).find(|at| own(*at) != own(index));
        let is_ranking = self
            .taught()
            .is_some_and(|(teach, _)| teach.loss != TeachLoss::Cosine);
        let other = other.filter(|_| is_ranking);
        let indices: Vec<usize> = std::iter::once(index).chain(other).collect();
        self.batch(model, data, &indices, 0)
    }

    /// At most `length` tokens of a batch of one example around its token at `at`, if that has a part in a target among them.
    /// Sentences with definitions stay whole.
    pub(crate) fn window(&self, batch: &Batch, at: usize, length: usize) -> Option<Batch> {
        match self.objective {
            Objective::Causal => batch.window(at, length, Predicts::Next),
            Objective::Masked(_) => batch.window(at, length, Predicts::Same),
            Objective::Teach(_) => Some(batch.clone()),
        }
    }

    /// The examples at `indices` as one batch; the first of them is the `first`th that the run takes, from 0. Masks are a
    /// pure function of the example and of how often all examples were taken before.
    ///
    /// # Errors
    ///
    /// [`Error::Dataset`] if none of them has a target.
    pub(crate) fn batch(
        &self,
        model: &LanguageModel,
        data: &Dataset,
        indices: &[usize],
        first: u64,
    ) -> Result<Batch> {
        match &self.objective {
            Objective::Causal => data.batch(indices),
            Objective::Masked(masking) => masked(masking.as_ref(), model, data, indices, first),
            Objective::Teach(_) => Ok(teach::batch(data, indices)),
        }
    }

    /// The mean loss of a batch.
    ///
    /// # Errors
    ///
    /// A token out of range; candle's errors.
    pub(crate) fn loss(&self, model: &LanguageModel, batch: &Batch, graph: Graph) -> Result<Tensor> {
        match (self.taught(), model) {
            (Some((teach, definitions)), LanguageModel::Encoder(encoder)) => {
                let embeddings = teach.embed(encoder, batch, graph)?;
                teach.loss(&embeddings, definitions, batch.definitions())
            }
            _ => token_loss(model, batch, graph),
        }
    }
}

/// The examples at `indices`, of which each token predicts its own label.
fn masked(
    masking: Option<&Masking>,
    model: &LanguageModel,
    data: &Dataset,
    indices: &[usize],
    first: u64,
) -> Result<Batch> {
    let count = data.examples().len() as u64;
    let examples = (first..).zip(indices).filter_map(|(taken, index)| {
        let example = data.examples().get(*index)?;
        let masked = match (&example.labels, masking) {
            (None, Some(masking)) => {
                let tokens = model.embedding().tokens();
                masking.apply(&example.input_ids, &tokens, taken / count, *index as u64)
            }
            _ => (example.input_ids.clone(), example.own_labels().into_owned()),
        };
        Some(masked)
    });
    let (input_ids, labels): (Vec<_>, Vec<_>) = examples.unzip();
    let mut batch = Batch::padded(input_ids.iter().map(Vec::as_slice), data.pad_id());
    for (row, labels) in labels.iter().enumerate() {
        let added = batch.add_targets(row, labels, Predicts::Same);
        added.ok_or_else(|| data.no_target(indices))?;
    }
    if batch.targets().is_empty() {
        return Err(data.no_target(indices));
    }
    Ok(batch)
}

/// Mean cross-entropy over the batch's targets, each predicted at its position. Computed in `f32`; only positions with a
/// target reach the output layer, a chunk of them at a time.
///
/// # Errors
///
/// A token out of range; candle's errors.
pub fn token_loss(model: &LanguageModel, batch: &Batch, graph: Graph) -> Result<Tensor> {
    let hidden = hidden(model, batch, graph)?;
    let mut labels = vec![IGNORED_LABEL; batch.input_ids().len()];
    for (position, target) in batch.target_positions().iter().zip(batch.targets()) {
        labels[*position as usize] = i64::from(*target);
    }
    let labels = Tensor::from_vec(labels, (batch.num_rows(), batch.length()), &Device::Cpu)?;
    model.cross_entropy(&hidden, &labels, graph)
}

/// The last hidden states of a batch `[B, L, D]`.
fn hidden(model: &LanguageModel, batch: &Batch, graph: Graph) -> Result<Tensor> {
    let (input_ids, embeddings) = embeddings(
        batch,
        graph,
        model.device(),
        !model.low_rank().is_empty(),
        |ids| model.embed(ids),
    )?;
    model.hidden(&embeddings, &input_ids, Some(batch.lengths()))
}

/// The tokens of a batch `[B, L]`, and what the embedding returns for them `[B, L, D]`, with a graph if it is kept.
fn embeddings(
    batch: &Batch,
    graph: Graph,
    device: &Device,
    has_low_rank: bool,
    embed: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let input_ids = Tensor::from_slice(batch.input_ids(), (batch.num_rows(), batch.length()), device)?;
    let mut embeddings = embed(&input_ids)?;
    match graph {
        Graph::Drop => embeddings = embeddings.detach(),
        // Weights of LoRA join the graph of their input, so that there must be one.
        Graph::Keep if !embeddings.track_op() && has_low_rank => {
            embeddings = Var::from_tensor(&embeddings)?.into_inner();
        }
        Graph::Keep => {}
    }
    Ok((input_ids, embeddings))
}

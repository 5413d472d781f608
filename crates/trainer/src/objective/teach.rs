//! Teaching a word: sentences that come close to definitions.

use std::fmt;

use candle_core::{D, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::FrozenLinear;

use super::embeddings;
use crate::loss::cross_entropy;
use crate::model::Pooling;
use crate::ops::mul_frozen;
use crate::{Batch, Dataset, Encoder, Error, Graph, Result};

/// How many definitions, or sentences without a graph, are embedded at a time.
const AT_A_TIME: usize = 32;

/// How far a sentence is from its definition.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum TeachLoss {
    /// `1 - cosine`.
    #[default]
    Cosine,
    /// Multiple negatives ranking (Henderson et al. 2017): cross-entropy of the cosines with all definitions of the batch,
    /// times a scale, for the sentence's own.
    Ranking {
        /// What cosines are multiplied by; 20 in sentence-transformers.
        scale: f64,
    },
}

/// Trains the embeddings of sentences toward those of their definitions, which are frozen: they are those of the model
/// before the first step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Teach {
    /// How hidden states become the embedding of a sentence.
    pub pooling: Pooling,
    /// How far the two are apart.
    pub loss: TeachLoss,
}

/// Embeddings of a data set's definitions, `[definitions, D]` of unit length, in `f32` at least.
#[derive(Debug)]
pub(crate) struct Definitions(Tensor);

impl Teach {
    /// Refuses a ranking that ranks nothing.
    pub(super) fn check(&self, data: &Dataset) -> Result<()> {
        let TeachLoss::Ranking { scale } = self.loss else {
            return Ok(());
        };
        if !(scale > 0.0 && scale.is_finite()) {
            let message = format!("the ranking scale is {scale}, but it must be a positive number");
            return Err(Error::Setting(message));
        }
        if data.definitions().len() == 1 {
            return Err(Error::Dataset {
                path: data.path_of(0).to_owned(),
                reason: "has one definition, but a ranking needs another".to_owned(),
            });
        }
        Ok(())
    }

    /// The embeddings of a data set's definitions now.
    pub(super) fn definitions(&self, encoder: &Encoder, data: &Dataset) -> Result<Definitions> {
        let sequences: Vec<&[u32]> = data.definitions().iter().map(Vec::as_slice).collect();
        self.embed_all(encoder, &sequences, data.pad_id())
            .map(Definitions)
    }

    /// The embeddings of a batch's sentences, `[B, D]` of unit length.
    pub(super) fn embed(&self, encoder: &Encoder, batch: &Batch, graph: Graph) -> Result<Tensor> {
        let has_low_rank = !encoder.low_rank().is_empty();
        let (input_ids, rows) = embeddings(batch, graph, encoder.device(), has_low_rank, |ids| {
            encoder.embed(ids)
        })?;
        let hidden = encoder.hidden(&rows, &input_ids, Some(batch.lengths()))?;
        let pooling = Pooling {
            normalizes: true,
            ..self.pooling
        };
        pooling.pool(&hidden, batch.lengths())
    }

    /// The embeddings of sequences, without a graph.
    pub(super) fn embed_all(&self, encoder: &Encoder, sequences: &[&[u32]], pad_id: u32) -> Result<Tensor> {
        let parts = sequences.chunks(AT_A_TIME).map(|part| {
            let batch = Batch::padded(part.iter().copied(), pad_id);
            self.embed(encoder, &batch, Graph::Drop)
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The mean loss of embeddings `[B, D]` whose definitions are those at `places`.
    pub(crate) fn loss(
        &self,
        embeddings: &Tensor,
        definitions: &Definitions,
        places: &[usize],
    ) -> Result<Tensor> {
        match self.loss {
            TeachLoss::Cosine => {
                let own = definitions.at(places)?;
                let cosine = mul_frozen(embeddings, &own)?.sum(D::Minus1)?;
                Ok(cosine.affine(-1.0, 1.0)?.mean_all()?)
            }
            TeachLoss::Ranking { scale } => {
                // A definition of several sentences of the batch is no negative of any of them.
                let mut distinct = places.to_vec();
                distinct.sort_unstable();
                distinct.dedup();
                let label = |place: &usize| (0i64..).zip(&distinct).find(|(_, it)| *it == place);
                let labels: Vec<i64> = places.iter().filter_map(|place| Some(label(place)?.0)).collect();
                let table = FrozenLinear::new(definitions.at(&distinct)?, None)?;
                let scores = (table.forward(embeddings)? * scale)?;
                cross_entropy(&scores, &Tensor::new(labels, &Device::Cpu)?)
            }
        }
    }
}

impl Definitions {
    /// `[D]` for each place: `[places, D]`.
    fn at(&self, places: &[usize]) -> Result<Tensor> {
        let places: Vec<u32> = places
            .iter()
            .filter_map(|place| u32::try_from(*place).ok())
            .collect();
        let places = Tensor::new(places, self.0.device())?;
        Ok(self.0.index_select(&places, 0)?)
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// The sentences at `indices`.
pub(super) fn batch(data: &Dataset, indices: &[usize]) -> Batch {
    let examples = indices.iter().filter_map(|index| data.examples().get(*index));
    let (sentences, definitions): (Vec<&[u32]>, Vec<usize>) = examples
        .filter_map(|example| Some((example.input_ids.as_slice(), example.definition?)))
        .unzip();
    Batch::padded(sentences, data.pad_id()).with_definitions(definitions)
}

impl fmt::Display for Teach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.loss {
            TeachLoss::Cosine => write!(f, "cosine")?,
            TeachLoss::Ranking { scale } => write!(f, "ranking of scale {scale}")?,
        }
        write!(f, ", {} pooling", self.pooling.mode.name())
    }
}

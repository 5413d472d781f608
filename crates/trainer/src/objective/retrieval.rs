//! Finding each sentence's definition among all of them.

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::teach::{Definitions, Teach};
use crate::{Dataset, Encoder, Result};

/// How well the embeddings of sentences find their own definitions among all definitions of a data set, by cosine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Retrieval {
    /// The share of sentences to which no other definition is as close as their own.
    pub recall_at_1: f64,
    /// Mean reciprocal rank of the own definition.
    pub mrr: f64,
    /// Mean cosine with the own definition.
    pub cosine: f64,
    /// How many sentences there are.
    pub sentences: usize,
    /// How many different definitions there are.
    pub definitions: usize,
}

impl Retrieval {
    /// Of a model as it is now, among definitions whose embeddings are there already. Also returns the embeddings of the
    /// sentences, `[sentences, D]`.
    pub(crate) fn measure(
        teach: &Teach,
        encoder: &Encoder,
        data: &Dataset,
        definitions: &Definitions,
    ) -> Result<(Self, Tensor)> {
        let examples = data.examples();
        let sentences: Vec<&[u32]> = examples.iter().map(|example| &*example.input_ids).collect();
        let embeddings = teach.embed_all(encoder, &sentences, data.pad_id())?;
        let cosines = embeddings.matmul(&definitions.tensor().t()?)?;
        let cosines = cosines.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let own = examples.iter().filter_map(|example| example.definition);
        let (mut found, mut reciprocal, mut sum) = (0.0, 0.0, 0.0);
        for (cosines, own) in cosines.iter().zip(own) {
            let rank = rank(cosines, own);
            found += f64::from(u8::from(rank == 1));
            reciprocal += 1.0 / rank as f64;
            sum += cosines[own];
        }
        let count = examples.len() as f64;
        let retrieval = Self {
            recall_at_1: found / count,
            mrr: reciprocal / count,
            cosine: sum / count,
            sentences: examples.len(),
            definitions: data.definitions().len(),
        };
        Ok((retrieval, embeddings))
    }
}

/// The place of `own` among the cosines, from 1. Another that is as high, or no number, comes first.
fn rank(cosines: &[f64], own: usize) -> usize {
    let others = cosines.iter().enumerate().filter(|(at, _)| *at != own);
    1 + others
        .filter(|(_, cosine)| !matches!(cosine.partial_cmp(&&cosines[own]), Some(std::cmp::Ordering::Less)))
        .count()
}

#[cfg(test)]
mod tests {
    use super::rank;

    #[test]
    fn ties_and_what_is_no_number_come_first() {
        let cosines = [0.1, 0.5, 0.5, -0.3, 0.9];
        assert_eq!([4, 1, 2, 0, 3].map(|own| rank(&cosines, own)), [1, 3, 3, 4, 5]);
        assert_eq!(rank(&[f64::NAN, 0.5], 1), 2);
        assert_eq!(rank(&[f64::NAN, 0.5], 0), 2);
        assert_eq!(rank(&[0.2], 0), 1);
    }
}

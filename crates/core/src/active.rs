//! Several adapters at once.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use crate::{Error, Result, RowMix, TokenId, TokenSet};

/// What counts for a token that several adapters train.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Overlap {
    /// Nothing: such adapters are refused, as in PEFT.
    #[default]
    Refuse,
    /// The row of the last of them.
    LastWins,
    /// The mean of their rows, weighted by these numbers: one for each adapter, in their order. Weights are relative to
    /// each other, among the adapters that train the token.
    WeightedMean(Vec<f64>),
}

impl Overlap {
    /// The tokens of named adapters together, and how their rows become one set: row `i` of the mix is for token `i`.
    ///
    /// # Errors
    ///
    /// [`Error::Overlap`]; [`Error::Shape`] and [`Error::Hyperparameter`] for weights.
    pub fn unite(&self, adapters: &[(&str, &TokenSet)], vocab_size: usize) -> Result<(TokenSet, RowMix)> {
        let shared: Vec<Arc<str>> = adapters.iter().map(|(name, _)| Arc::from(*name)).collect();
        let named: Vec<_> = shared
            .iter()
            .zip(adapters.iter().map(|(_, tokens)| *tokens))
            .collect();
        let ActiveSet { tokens, mix, .. } = ActiveSet::new(&named, self, vocab_size)?;
        Ok((tokens, mix))
    }

    /// The choice among some of the adapters, by their places: weights are those of these adapters.
    #[must_use]
    pub fn among(&self, places: impl IntoIterator<Item = usize>) -> Self {
        match self {
            Self::WeightedMean(weights) => {
                let weights = places.into_iter().filter_map(|at| weights.get(at).copied());
                Self::WeightedMean(weights.collect())
            }
            other => other.clone(),
        }
    }

    /// The weight of each of `adapters`, if there are weights.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for another number of weights, [`Error::Hyperparameter`] for one that is not above 0.
    pub fn expect_weights(&self, adapters: usize) -> Result<&[f64]> {
        let Self::WeightedMean(weights) = self else {
            return Ok(&[]);
        };
        if weights.len() != adapters {
            let (expected, got) = ([adapters], [weights.len()]);
            return Err(Error::shape("weights of the adapters", &expected, &got));
        }
        match weights
            .iter()
            .find(|weight| !(weight.is_finite() && **weight > 0.0))
        {
            Some(weight) => Err(Error::Hyperparameter {
                name: "weight of an adapter",
                value: *weight,
                must: "above 0",
            }),
            None => Ok(weights),
        }
    }
}

/// The tokens of several adapters together, and what their rows are.
#[derive(Clone, Debug)]
pub(crate) struct ActiveSet {
    /// Slot `i` is row `i` of the mix.
    pub(crate) tokens: TokenSet,
    pub(crate) mix: RowMix,
    /// What it was made of.
    of: (Vec<u64>, Overlap),
}

/// An adapter as far as its tokens go.
pub(crate) type NamedTokens<'a> = (&'a Arc<str>, &'a TokenSet);

impl ActiveSet {
    /// Unites adapters in their order.
    pub(crate) fn new(adapters: &[NamedTokens<'_>], overlap: &Overlap, vocab_size: usize) -> Result<Self> {
        let weights = overlap.expect_weights(adapters.len())?;
        let mut order: Vec<TokenId> = Vec::new();
        let mut terms: HashMap<TokenId, Vec<(u32, usize)>> = HashMap::new();
        let stacked = adapters
            .iter()
            .enumerate()
            .flat_map(|(at, (_, tokens))| tokens.ids().iter().map(move |id| (at, *id)));
        for (slot, (at, id)) in (0u32..).zip(stacked) {
            let entry = terms.entry(id).or_default();
            match (overlap, entry.first()) {
                (_, None) => order.push(id),
                (Overlap::Refuse, Some((_, first))) => {
                    return Err(overlapping(id, adapters[*first].0, adapters[at].0));
                }
                (Overlap::LastWins, Some(_)) => entry.clear(),
                (Overlap::WeightedMean(_), Some(_)) => {}
            }
            entry.push((slot, at));
        }
        // Weighted rows come first, those with the most summands before the others.
        order.sort_by_key(|id| Reverse(Some(terms[id].len()).filter(|len| *len > 1)));
        let mut weighted = Vec::new();
        let mut picks = Vec::new();
        for id in &order {
            match &terms[id][..] {
                [(slot, _)] => picks.push(*slot),
                several => {
                    // Relative to the largest, so that no sum overflows.
                    let largest = several.iter().map(|(_, at)| weights[*at]).fold(0.0, f64::max);
                    let sum: f64 = several.iter().map(|(_, at)| weights[*at] / largest).sum();
                    let share = |(slot, at): &(u32, usize)| (*slot, weights[*at] / largest / sum);
                    weighted.push(several.iter().map(share).collect());
                }
            }
        }
        let part_rows = adapters.iter().map(|(_, tokens)| tokens.len()).collect();
        Ok(Self {
            tokens: TokenSet::new(order.iter().map(|id| id.0), vocab_size)?,
            mix: RowMix::new(part_rows, &weighted, picks),
            of: (
                adapters.iter().map(|(_, tokens)| tokens.fingerprint()).collect(),
                overlap.clone(),
            ),
        })
    }

    /// Whether it was made of these token sets, in this order and by this choice.
    pub(crate) fn is_of(&self, fingerprints: &[u64], overlap: &Overlap) -> bool {
        self.of.0 == fingerprints && self.of.1 == *overlap
    }
}

/// Refuses adapters that share a token.
pub(crate) fn expect_disjoint(a: NamedTokens<'_>, b: NamedTokens<'_>) -> Result<()> {
    match b.1.ids().iter().find(|id| a.1.contains(**id)) {
        Some(id) => Err(overlapping(*id, a.0, b.0)),
        None => Ok(()),
    }
}

fn overlapping(token: TokenId, first: &str, second: &str) -> Error {
    Error::Overlap {
        token,
        first: first.to_owned(),
        second: second.to_owned(),
    }
}

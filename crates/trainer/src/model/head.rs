//! The output layer.

use candle_core::Tensor;
use candle_nn::Module;
use trainable_tokens_candle::{TiedHead, TrainableTokens};
use trainable_tokens_core::{CrossEntropyOptions, Softcap};

use super::linear::Linear;
use crate::loss::cross_entropy;
use crate::{Graph, Result};

#[derive(Debug)]
pub(super) enum Head {
    Tied(TiedHead),
    Untied(Linear),
    /// A table of its own, with trained rows of its own.
    Rows(TrainableTokens),
}

impl Head {
    /// The logits of hidden states `[.., D]`: `[.., V]`.
    pub(super) fn logits(&self, hidden: &Tensor, softcap: Option<Softcap>) -> Result<Tensor> {
        let logits = match self {
            Self::Tied(head) => head.forward(hidden)?,
            Self::Untied(head) => head.forward(hidden)?,
            Self::Rows(head) => head.tied_head().forward(hidden)?,
        };
        Ok(match softcap.map(Softcap::get) {
            Some(softcap) => ((logits / softcap)?.tanh()? * softcap)?,
            None => logits,
        })
    }

    /// The cross-entropy of the logits of hidden states `[.., D]` for the label of each, `[..]`. Without a graph no
    /// gradient is prepared.
    pub(super) fn cross_entropy(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
        graph: Graph,
    ) -> Result<Tensor> {
        Ok(match (self, graph) {
            (Self::Tied(head), Graph::Keep) => head.cross_entropy(hidden, labels, options)?,
            (Self::Tied(head), Graph::Drop) => head.evaluate_cross_entropy(hidden, labels, options)?,
            (Self::Rows(head), Graph::Keep) => head.tied_head().cross_entropy(hidden, labels, options)?,
            (Self::Rows(head), Graph::Drop) => {
                head.tied_head().evaluate_cross_entropy(hidden, labels, options)?
            }
            (Self::Untied(head), _) => match (head.frozen(), graph) {
                (Some(head), Graph::Keep) => head.cross_entropy(hidden, labels, options)?,
                (Some(head), Graph::Drop) => head.evaluate_cross_entropy(hidden, labels, options)?,
                (None, _) => cross_entropy(&self.logits(hidden, options.softcap)?, labels)?,
            },
        })
    }

    /// The trained rows of a head that is not tied.
    pub(super) fn rows(&self) -> Option<&TrainableTokens> {
        match self {
            Self::Rows(head) => Some(head),
            Self::Tied(_) | Self::Untied(_) => None,
        }
    }
}

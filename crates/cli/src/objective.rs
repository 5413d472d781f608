//! What training minimises, as it is asked for.

use anyhow::Result;
use clap::{Args, ValueEnum};
use trainable_tokens_trainer::{Architecture, MaskTrainable, Masking, Objective, Pooling, Teach, TeachLoss};

use crate::model::Model;

/// What is minimised.
#[derive(Debug, Args)]
pub(crate) struct ObjectiveArgs {
    /// What is minimised [default: causal for a decoder, masked for an encoder].
    #[arg(long, value_enum)]
    objective: Option<ObjectiveChoice>,
    /// How likely a token of a line without labels is masked.
    #[arg(long, default_value_t = Masking::PROBABILITY, value_name = "P")]
    mask_probability: f64,
    /// Whether the tokens that train are masked.
    #[arg(long, value_enum, default_value_t = MaskChoice::Sometimes)]
    mask_trainable: MaskChoice,
    /// How far a sentence is from the definition that it is taught.
    #[arg(long, value_enum, default_value_t = TeachChoice::Cosine)]
    teach_loss: TeachChoice,
    /// With --teach-loss ranking: what cosines are multiplied by.
    #[arg(long, default_value_t = 20.0, value_name = "F")]
    ranking_scale: f64,
}

/// Objectives.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ObjectiveChoice {
    /// Predict the next token.
    Causal,
    /// Predict labels in place; lines without labels are masked at random.
    Masked,
    /// Bring sentences close to definitions.
    Teach,
}

/// How tokens that train are masked.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum MaskChoice {
    /// Like any other token.
    Sometimes,
    /// Wherever they occur.
    Always,
    /// Nowhere.
    Never,
}

/// How far a sentence is from its definition.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TeachChoice {
    /// 1 - cosine.
    Cosine,
    /// Cross-entropy of the cosines with all definitions of the batch.
    Ranking,
}

impl ObjectiveArgs {
    /// The objective for a model.
    pub(crate) fn resolve(&self, model: &Model, seed: u64) -> Result<Objective> {
        let choice = self.objective.unwrap_or(match model.config {
            Architecture::Decoder(_) => ObjectiveChoice::Causal,
            Architecture::Encoder(_) => ObjectiveChoice::Masked,
        });
        Ok(match choice {
            ObjectiveChoice::Causal => Objective::Causal,
            ObjectiveChoice::Masked => Objective::Masked(self.masking(model, seed)?),
            ObjectiveChoice::Teach => Objective::Teach(Teach {
                pooling: Pooling::of_model(model.checkpoint.dir())?.unwrap_or_default(),
                loss: match self.teach_loss {
                    TeachChoice::Cosine => TeachLoss::Cosine,
                    TeachChoice::Ranking => TeachLoss::Ranking {
                        scale: self.ranking_scale,
                    },
                },
            }),
        })
    }

    /// How lines without labels are masked, if the model has a tokenizer with a mask token.
    fn masking(&self, model: &Model, seed: u64) -> Result<Option<Masking>> {
        if !model.vocabulary.exists() {
            return Ok(None);
        }
        let masking = Masking::of(&model.vocabulary)?.map(|masking| Masking {
            probability: self.mask_probability,
            trainable: match self.mask_trainable {
                MaskChoice::Sometimes => MaskTrainable::Sometimes,
                MaskChoice::Always => MaskTrainable::Always,
                MaskChoice::Never => MaskTrainable::Never,
            },
            seed,
            ..masking
        });
        Ok(masking)
    }
}

//! What a run saves, on the way and at its end.

use std::fs;

use anyhow::{Context, Result, bail};
use trainable_tokens_format::{Adapter, Overwrite, write_dir_atomically};
use trainable_tokens_trainer::Trainer;

use super::Run;

/// The directory, inside that of a run under way, of the adapter with the best evaluation so far.
pub(super) const BEST_DIR: &str = "best";
/// The file, beside an adapter, of the options that it was trained with.
pub(super) const CONFIG_FILE: &str = "train_config.toml";

/// How far a run is when it saves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It will go on, here or resumed.
    UnderWay,
    /// It has ended.
    Ended,
}

impl Run<'_> {
    /// Writes the adapter, with all that belongs to it, as one directory.
    ///
    /// A run under way has the state to resume from beside it, and the best adapter so far inside it. A run that has ended and
    /// keeps the best has no state: the state is that of the last step.
    pub(super) fn save(&self, trainer: &mut Trainer, overwrite: Overwrite, stage: Stage) -> Result<()> {
        let adapter = self.adapter(trainer)?;
        let (resumable, has_best) = match stage {
            Stage::UnderWay => (true, trainer.remembers_best()),
            Stage::Ended => (self.outputs.save_every.is_some() && !self.keep_best, false),
        };
        let best = if has_best {
            Some(trainer.at_best(|trainer| self.adapter(trainer))?)
        } else {
            None
        };
        let training_state = resumable.then(|| trainer.training_state()).transpose()?;
        write_dir_atomically(self.outputs.adapter, overwrite, |dir| -> Result<()> {
            adapter.write_into(dir)?;
            if let Some(best) = &best {
                let inside = dir.join(BEST_DIR);
                fs::create_dir(&inside).with_context(|| format!("cannot create {}", inside.display()))?;
                best.write_into(&inside)?;
            }
            if let Some(training_state) = &training_state {
                training_state.write_into(dir)?;
            }
            let path = dir.join(CONFIG_FILE);
            fs::write(&path, self.outputs.config).with_context(|| format!("cannot write {}", path.display()))
        })
    }

    /// The adapter of the trainer's values as they are now.
    fn adapter(&self, trainer: &Trainer) -> Result<Adapter> {
        let layer = trainer.model().embedding();
        let (tokens, rows) = (layer.tokens().to_vec(), layer.rows()?);
        // The loss tells only of the rows before the last step.
        if let Some((slot, column)) = rows.first_non_finite() {
            bail!(
                "the row of token id {} is not finite at column {column} after step {}: lower the learning rate",
                tokens.get(slot).copied().unwrap_or_default(),
                trainer.steps_taken()
            );
        }
        for low_rank in trainer.model().low_rank() {
            if !low_rank
                .read()?
                .iter()
                .all(|factor| factor.first_non_finite().is_none())
            {
                bail!(
                    "the weights of LoRA for {} are not finite after step {}: lower the learning rate",
                    low_rank.path(),
                    trainer.steps_taken()
                );
            }
        }
        let builder = self
            .model
            .adapter_builder(self.model_dir, &tokens, rows, self.initial)?;
        let builder = match self.lora {
            None => builder.target_modules(self.target_modules.to_vec()),
            Some(lora) => {
                let config = lora.config(&self.model.checkpoint)?;
                trainer.model().add_low_rank(builder.lora(config))?
            }
        };
        Ok(builder.build()?)
    }
}

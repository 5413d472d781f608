//! Rows that training does not reach.

use anyhow::Result;
use serde::Serialize;
use trainable_tokens_core::TokenId;
use trainable_tokens_trainer::{TokenActivity, Trainer, Vocabulary};

use crate::rows::token_name;

/// A token whose row no step has reached.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DeadToken {
    pub(crate) token_id: u32,
    pub(crate) token: Option<String>,
    pub(crate) reason: &'static str,
    /// How often the token stands in the examples of the steps.
    pub(crate) occurrences: u64,
}

impl DeadToken {
    fn new(activity: &TokenActivity, trainer: &Trainer, vocabulary: &Vocabulary) -> Result<Self> {
        let TokenActivity { id, occurrences, .. } = *activity;
        let reason = if occurrences > 0 {
            "its gradient was exactly 0 in every step"
        } else if occurs(trainer, id) {
            "it does not occur in the data of the steps so far"
        } else {
            "it never occurs in the data"
        };
        let token = if vocabulary.exists() {
            vocabulary.token(id.0)?
        } else {
            None
        };
        Ok(Self {
            token_id: id.0,
            token,
            reason,
            occurrences,
        })
    }

    /// The token by its string and its id.
    pub(crate) fn name(&self) -> String {
        let name = token_name(self.token_id, self.token.as_deref());
        if self.token.is_some() {
            format!("{name} (token id {})", self.token_id)
        } else {
            name
        }
    }
}

/// The tokens that no step has reached.
pub(crate) fn dead_tokens(trainer: &Trainer, vocabulary: &Vocabulary) -> Result<Vec<DeadToken>> {
    let dead = trainer.activity().iter().filter(|activity| activity.is_dead());
    dead.map(|activity| DeadToken::new(activity, trainer, vocabulary))
        .collect()
}

/// What to say of rows that have just gone `after` steps without a gradient.
pub(crate) fn warnings(trainer: &Trainer, vocabulary: &Vocabulary, after: u64) -> Result<Vec<String>> {
    let idle = trainer.activity().iter();
    let idle = idle.filter(|activity| after > 0 && activity.idle_steps == after && !activity.frozen);
    idle.map(|activity| {
        let token = DeadToken::new(activity, trainer, vocabulary)?;
        let why = if activity.is_dead() {
            token.reason
        } else {
            "it was reached before"
        };
        Ok(format!(
            "warning: no gradient has reached the row of {} in {after} steps: {why}",
            token.name()
        ))
    })
    .collect()
}

fn occurs(trainer: &Trainer, id: TokenId) -> bool {
    let mut examples = trainer.data().examples().iter();
    examples.any(|example| {
        let labels = example.labels.iter().flatten();
        labels.copied().any(|label| label == i64::from(id.0)) || example.input_ids.contains(&id.0)
    })
}

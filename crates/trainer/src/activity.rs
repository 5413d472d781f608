//! Which rows training reaches.

use serde::{Deserialize, Serialize};
use trainable_tokens_core::{TokenId, TokenRows, TokenSet};

use crate::Example;

/// Counts of more tokens than this are not saved: they would not fit into the text of a training state, which is limited.
const MOST_SAVED: usize = 1 << 15;

/// What training has done to one row of the input embedding so far. A resumed run counts on from what was saved, but for more
/// than 32768 tokens, whose counts are not saved: then since it was resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenActivity {
    /// The token.
    pub id: TokenId,
    /// How often it stood in the examples of the steps, as input or as target.
    pub occurrences: u64,
    /// Steps that reached the row: its gradient was not exactly 0, and the token stood in an example. A head that is tied to
    /// the table gives every row a gradient, which alone says nothing.
    pub steps_reached: u64,
    /// Steps since the last of them.
    pub idle_steps: u64,
    /// Whether the row does not train by choice: its learning rate is 0.
    pub frozen: bool,
}

impl TokenActivity {
    /// Whether no step has reached the row, though it should train.
    pub fn is_dead(&self) -> bool {
        self.steps_reached == 0 && !self.frozen
    }
}

/// The counts of all tokens, in slot order, as a training state holds them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedActivity {
    occurrences: Vec<u64>,
    steps_reached: Vec<u64>,
    idle_steps: Vec<u64>,
}

/// The counts of all tokens, in slot order.
pub(crate) struct Activity {
    tokens: TokenSet,
    counts: Vec<TokenActivity>,
    /// Whether the token stood in the examples of the step that is being taken.
    present: Vec<bool>,
}

impl Activity {
    pub(crate) fn new(tokens: TokenSet, frozen: impl Fn(TokenId) -> bool) -> Self {
        let counts = tokens.ids().iter().map(|id| TokenActivity {
            id: *id,
            occurrences: 0,
            steps_reached: 0,
            idle_steps: 0,
            frozen: frozen(*id),
        });
        Self {
            counts: counts.collect(),
            present: vec![false; tokens.len()],
            tokens,
        }
    }

    pub(crate) fn counts(&self) -> &[TokenActivity] {
        &self.counts
    }

    /// What a training state holds of the counts, if they are not too many.
    pub(crate) fn saved(&self) -> Option<SavedActivity> {
        let all = |count: fn(&TokenActivity) -> u64| self.counts.iter().map(count).collect();
        (self.counts.len() <= MOST_SAVED).then(|| SavedActivity {
            occurrences: all(|it| it.occurrences),
            steps_reached: all(|it| it.steps_reached),
            idle_steps: all(|it| it.idle_steps),
        })
    }

    /// Counts on from what was saved; none if it is not of as many tokens.
    pub(crate) fn continued(&self, saved: &SavedActivity) -> Option<Self> {
        let SavedActivity {
            occurrences,
            steps_reached,
            idle_steps,
        } = saved;
        let lists = [occurrences, steps_reached, idle_steps];
        if lists.iter().any(|list| list.len() != self.counts.len()) {
            return None;
        }
        let saved = occurrences.iter().zip(steps_reached).zip(idle_steps);
        let counts = self.counts.iter().zip(saved);
        let counts = counts.map(
            |(now, ((occurrences, steps_reached), idle_steps))| TokenActivity {
                occurrences: *occurrences,
                steps_reached: *steps_reached,
                idle_steps: *idle_steps,
                ..*now
            },
        );
        Some(Self {
            counts: counts.collect(),
            present: vec![false; self.tokens.len()],
            tokens: self.tokens.clone(),
        })
    }

    /// An example of the step that is being taken.
    pub(crate) fn see(&mut self, example: &Example) {
        for id in ids(example) {
            if let Some(slot) = self.tokens.slot(id) {
                let count = &mut self.counts[slot.0].occurrences;
                *count = count.saturating_add(1);
                self.present[slot.0] = true;
            }
        }
    }

    /// The end of a step with this gradient of the rows.
    pub(crate) fn end_step(&mut self, gradient: &TokenRows) {
        let norms = gradient.row_norms();
        for ((count, present), norm) in self.counts.iter_mut().zip(&mut self.present).zip(norms) {
            if std::mem::take(present) && norm != 0.0 {
                count.steps_reached = count.steps_reached.saturating_add(1);
                count.idle_steps = 0;
            } else {
                count.idle_steps = count.idle_steps.saturating_add(1);
            }
        }
    }
}

/// The tokens of an example, each place once: targets are the inputs, or others.
pub(crate) fn ids(example: &Example) -> impl Iterator<Item = TokenId> {
    let labels = example.labels.as_deref().unwrap_or_default();
    let others = labels.iter().map(|label| u32::try_from(*label).ok());
    let places = example
        .input_ids
        .iter()
        .zip(others.chain(std::iter::repeat(None)));
    places.flat_map(|(id, label)| {
        let other = label.filter(|label| label != id);
        std::iter::once(*id).chain(other).map(TokenId)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IGNORED;

    #[test]
    fn a_row_is_reached_by_a_gradient_of_a_token_that_is_there() {
        let mut activity = Activity::new(TokenSet::new([7, 3, 9, 5], 10).unwrap(), |id| id.0 == 5);
        let example = |input_ids: &[u32], labels: &[i64]| Example {
            input_ids: input_ids.to_vec(),
            labels: Some(labels.to_vec()),
            definition: None,
            line: 1,
        };
        let gradient = |norms: [f32; 4]| TokenRows::new(norms.to_vec(), 4, 1).unwrap();
        activity.see(&example(&[7, 1, 7], &[7, 1, IGNORED]));
        activity.see(&example(&[1, 2], &[1, 3]));
        activity.end_step(&gradient([0.5, 1e-30, 2.0, 0.0]));
        activity.see(&example(&[7, 9], &[7, 9]));
        activity.end_step(&gradient([0.0, 1.0, 1.0, 0.0]));
        let counts: Vec<_> = activity
            .counts()
            .iter()
            .map(|c| (c.occurrences, c.steps_reached, c.idle_steps))
            .collect();
        assert_eq!(counts, [(3, 1, 1), (1, 1, 1), (1, 1, 0), (0, 0, 2)]);
        assert!(
            activity.counts().iter().all(|count| !count.is_dead()),
            "the last one is frozen"
        );
        let mut activity = Activity::new(TokenSet::new([7], 10).unwrap(), |_| false);
        activity.end_step(&TokenRows::new(vec![1.0f32], 1, 1).unwrap());
        assert!(
            activity.counts()[0].is_dead(),
            "a gradient of a tied head alone says nothing"
        );
    }
}

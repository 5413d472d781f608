//! Padded batches.

use super::example::{Example, IGNORED};

/// Sequences of one step, padded at the end to the longest. Padding is no target, and no token sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    input_ids: Vec<u32>,
    length: usize,
    lengths: Vec<usize>,
    target_positions: Vec<u32>,
    targets: Vec<u32>,
    definitions: Vec<usize>,
}

/// Which label the output at a position must predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Predicts {
    /// Its own.
    Same,
    /// That of the next position.
    Next,
}

impl Batch {
    /// Pads sequences with `pad_id`; there is no target yet.
    pub(crate) fn padded<'a>(sequences: impl IntoIterator<Item = &'a [u32]>, pad_id: u32) -> Self {
        let sequences: Vec<&[u32]> = sequences.into_iter().collect();
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        let length = lengths.iter().max().copied().unwrap_or(0);
        let mut input_ids = vec![pad_id; sequences.len() * length];
        for (row, ids) in input_ids.chunks_exact_mut(length.max(1)).zip(sequences) {
            row[..ids.len()].copy_from_slice(ids);
        }
        Self {
            input_ids,
            length,
            lengths,
            target_positions: Vec::new(),
            targets: Vec::new(),
            definitions: Vec::new(),
        }
    }

    /// Adds the labels of a row that are not ignored as targets; `None` for one that is no token.
    pub(crate) fn add_targets(&mut self, row: usize, labels: &[i64], predicts: Predicts) -> Option<()> {
        let first = usize::from(predicts == Predicts::Next);
        let positions = (row * self.length..).zip(labels.iter().skip(first));
        for (position, label) in positions.filter(|(_, label)| **label != IGNORED) {
            self.target_positions.push(u32::try_from(position).ok()?);
            self.targets.push(u32::try_from(*label).ok()?);
        }
        Some(())
    }

    /// Says which definition each row belongs to.
    pub(crate) fn with_definitions(mut self, definitions: Vec<usize>) -> Self {
        self.definitions = definitions;
        self
    }

    /// Pads `examples` with `pad_id`; each token predicts the next one's label. `None` if there is no target.
    pub fn new(examples: &[&Example], pad_id: u32) -> Option<Self> {
        let mut batch = Self::padded(examples.iter().map(|example| &*example.input_ids), pad_id);
        for (row, example) in examples.iter().enumerate() {
            batch.add_targets(row, &example.own_labels(), Predicts::Next)?;
        }
        (!batch.targets.is_empty()).then_some(batch)
    }

    /// The tokens, `[num_rows, length]` row-major.
    pub fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    /// Examples in the batch.
    pub fn num_rows(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of the longest example.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens of each example, without padding.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Flattened positions whose output must predict a target.
    pub fn target_positions(&self) -> &[u32] {
        &self.target_positions
    }

    /// The target of each of [`target_positions`](Self::target_positions).
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// Tokens that are not padding.
    pub fn num_tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// For sentences with definitions: the number of each example's.
    pub fn definitions(&self) -> &[usize] {
        &self.definitions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_and_padding_is_no_target() {
        let long = Example {
            input_ids: vec![5, 6, 7],
            labels: Some(vec![5, IGNORED, 7]),
            definition: None,
            line: 1,
        };
        let short = Example {
            input_ids: vec![8, 9],
            labels: None,
            definition: None,
            line: 2,
        };
        let batch = Batch::new(&[&long, &short], 3).unwrap();
        assert_eq!(batch.input_ids(), [5, 6, 7, 8, 9, 3]);
        assert_eq!(
            (batch.target_positions(), batch.targets()),
            (&[1, 3][..], &[7, 9][..])
        );
        assert_eq!((batch.num_tokens(), batch.length()), (5, 3));
        let ignored = Example {
            input_ids: vec![1, 2],
            labels: Some(vec![1, IGNORED]),
            definition: None,
            line: 3,
        };
        assert!(Batch::new(&[&ignored], 0).is_none());
    }
}

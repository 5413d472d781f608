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

    /// At most `length` tokens of the one row of a batch around its token at `at`; none if there is no target among them
    /// that the token has a part in: for a causal model, none at it or behind it.
    pub(crate) fn window(&self, at: usize, length: usize, predicts: Predicts) -> Option<Self> {
        let start = at.saturating_sub(length / 2);
        let end = self.length.min(start.saturating_add(length));
        let first = match predicts {
            Predicts::Same => start,
            Predicts::Next => at,
        };
        let [start_position, end_position, first] = [start, end, first].map(|at| u32::try_from(at).ok());
        let (start_position, positions) = (start_position?, first?..end_position?);
        self.target_positions.iter().find(|at| positions.contains(at))?;
        let targets = self.target_positions.iter().zip(&self.targets);
        let kept = targets.filter(|(at, _)| (start_position..positions.end).contains(at));
        let (target_positions, targets) = kept.map(|(at, target)| (*at - start_position, *target)).unzip();
        Some(Self {
            input_ids: self.input_ids.get(start..end)?.to_vec(),
            length: end - start,
            lengths: vec![end - start],
            target_positions,
            targets,
            definitions: Vec::new(),
        })
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

    /// How many terms the mean loss of the batch is over: its targets, or its sentences with definitions.
    pub(crate) fn num_terms(&self) -> usize {
        self.targets.len() + self.definitions.len()
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

    #[test]
    fn a_window_has_its_token_and_a_target_of_it() {
        let mut labels = vec![IGNORED; 100];
        labels[60] = 7;
        let example = Example {
            input_ids: (0..100).collect(),
            labels: Some(labels.clone()),
            definition: None,
            line: 1,
        };
        let causal = Batch::new(&[&example], 0).unwrap();
        let window = |at, length| causal.window(at, length, Predicts::Next);
        let part = window(55, 20).unwrap();
        assert_eq!(part.input_ids(), (45..65).collect::<Vec<u32>>());
        assert_eq!((part.target_positions(), part.targets()), (&[14][..], &[7][..]));
        assert_eq!(window(55, 1000).unwrap().length(), 100);
        assert_eq!(window(51, 20).unwrap().length(), 20);
        for (at, length) in [(60, 20), (40, 20), (55, 8), (99, 20), (200, 20)] {
            assert!(window(at, length).is_none(), "{at} {length}");
        }
        let mut masked = Batch::padded([&*example.input_ids], 0);
        masked.add_targets(0, &labels, Predicts::Same).unwrap();
        let window = |at, length| masked.window(at, length, Predicts::Same);
        for at in [55, 60, 65] {
            let part = window(at, 20).unwrap();
            assert_eq!((part.length(), part.targets()), (20, &[7][..]));
            assert_eq!(part.input_ids()[part.target_positions()[0] as usize], 60);
        }
        assert!(window(71, 20).is_none());
    }
}

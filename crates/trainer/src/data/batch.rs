//! Padded batches.

use super::example::{Example, IGNORED};

/// Examples of one step, padded at the end to the longest.
///
/// Attention is causal, so that no token sees the padding behind it, and padding is no target: it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    input_ids: Vec<u32>,
    num_rows: usize,
    length: usize,
    target_positions: Vec<u32>,
    targets: Vec<u32>,
    num_tokens: usize,
}

impl Batch {
    /// Pads `examples` with `pad_id`; `None` if there is no target.
    pub fn new(examples: &[&Example], pad_id: u32) -> Option<Self> {
        let length = examples.iter().map(|example| example.input_ids.len()).max()?;
        let mut batch = Self {
            input_ids: vec![pad_id; examples.len() * length],
            num_rows: examples.len(),
            length,
            target_positions: Vec::new(),
            targets: Vec::new(),
            num_tokens: examples.iter().map(|example| example.input_ids.len()).sum(),
        };
        for (row, example) in examples.iter().enumerate() {
            let start = row * length;
            batch.input_ids[start..][..example.input_ids.len()].copy_from_slice(&example.input_ids);
            for (position, label) in (start..)
                .zip(example.labels.iter().skip(1))
                .filter(|(_, l)| **l != IGNORED)
            {
                batch.target_positions.push(u32::try_from(position).ok()?);
                batch.targets.push(u32::try_from(*label).ok()?);
            }
        }
        (!batch.targets.is_empty()).then_some(batch)
    }

    /// The tokens, `[num_rows, length]` row-major.
    pub fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    /// Examples in the batch.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Tokens of the longest example.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Flattened positions whose successor is a target.
    pub fn target_positions(&self) -> &[u32] {
        &self.target_positions
    }

    /// The target after each of [`target_positions`](Self::target_positions).
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// Tokens that are not padding.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_and_padding_is_no_target() {
        let long = Example {
            input_ids: vec![5, 6, 7],
            labels: vec![5, IGNORED, 7],
            line: 1,
        };
        let short = Example {
            input_ids: vec![8, 9],
            labels: vec![8, 9],
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
            labels: vec![1, IGNORED],
            line: 3,
        };
        assert!(Batch::new(&[&ignored], 0).is_none());
    }
}

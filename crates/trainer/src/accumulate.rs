//! Several batches as one.

use trainable_tokens_core::TokenRows;

use crate::Result;

/// Loss and gradient of the mean over all targets of several batches, from those of each batch's own mean.
///
/// A batch counts by its targets, as in transformers since 4.46 (`num_items_in_batch`): the result is that of one large
/// batch. Sums are in `f64`, and rounded once.
pub(crate) struct Accumulated {
    targets: usize,
    loss: f64,
    gradients: Gradients,
}

enum Gradients {
    /// Of a single batch with all targets, as they are.
    Whole(Vec<TokenRows>),
    /// Sums, beside something of their shapes and types.
    Sums(Vec<(Vec<f64>, TokenRows)>),
}

impl Accumulated {
    /// For batches with `targets` targets together.
    pub(crate) fn over(targets: usize) -> Self {
        Self {
            targets,
            loss: 0.0,
            gradients: Gradients::Sums(Vec::new()),
        }
    }

    /// Adds a batch of `targets` targets.
    pub(crate) fn add(&mut self, loss: f64, gradients: Vec<TokenRows>, targets: usize) {
        if targets == self.targets {
            self.loss = loss;
            self.gradients = Gradients::Whole(gradients);
            return;
        }
        let weight = targets as f64 / self.targets as f64;
        self.loss += weight * loss;
        let Gradients::Sums(sums) = &mut self.gradients else {
            return;
        };
        if sums.is_empty() {
            let nothing = gradients
                .iter()
                .map(|rows| (vec![0.0; rows.data().len()], rows.clone()));
            sums.extend(nothing);
        }
        for ((sum, _), rows) in sums.iter_mut().zip(gradients) {
            for (sum, value) in sum.iter_mut().zip(rows.to_f64_vec()) {
                *sum += weight * value;
            }
        }
    }

    /// The mean loss.
    pub(crate) fn loss(&self) -> f64 {
        self.loss
    }

    /// The gradient of each part.
    pub(crate) fn into_gradients(self) -> Result<Vec<TokenRows>> {
        match self.gradients {
            Gradients::Whole(gradients) => Ok(gradients),
            Gradients::Sums(sums) => sums
                .into_iter()
                .map(|(sum, like)| {
                    let [rows, columns] = like.shape();
                    Ok(TokenRows::new(sum, rows, columns)?.to_dtype(like.dtype()))
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32]) -> TokenRows {
        TokenRows::new(values.to_vec(), 1, values.len()).unwrap()
    }

    #[test]
    fn batches_count_by_their_targets() {
        let mut sum = Accumulated::over(8);
        sum.add(4.0, vec![rows(&[1.0, 8.0]), rows(&[2.0])], 2);
        sum.add(0.0, vec![rows(&[5.0, 0.0]), rows(&[2.0])], 6);
        assert_eq!(sum.loss(), 1.0);
        assert_eq!(sum.into_gradients().unwrap(), [rows(&[4.0, 2.0]), rows(&[2.0])]);
    }

    #[test]
    fn one_batch_stays_as_it_is() {
        let mut sum = Accumulated::over(3);
        sum.add(0.1, vec![rows(&[-0.0, f32::MIN_POSITIVE])], 3);
        assert_eq!(sum.loss(), 0.1);
        let kept = sum.into_gradients().unwrap();
        assert!(kept[0].bits_eq(&rows(&[-0.0, f32::MIN_POSITIVE])));
    }
}

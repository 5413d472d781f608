//! The check of the gradient before the first step.

use candle_core::DType;
use candle_core::backprop::GradStore;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainable_tokens_core::{PaddingRule, Slot, TokenId, TokenRows};

use super::Trainer;
use crate::loss::scalar;
use crate::part::{self, Part};
use crate::probe::{SHORTEST_FACTOR, SHORTEST_ROW};
use crate::{Batch, Error, GradientCheck, Graph, Objective, Result, check_gradient};

/// Tokens of the example that the gradient is checked on: each of many losses costs by them, and by the vocabulary.
const PROBE_LENGTH: usize = 64;

impl Trainer {
    /// Compares the gradient of the first example with finite differences of its loss, once for the rows and once for
    /// LoRA's factors; all values are as before afterwards. Rows of zeros are compared at another place, for the norms behind
    /// them bend the loss there too sharply to be followed by differences. The row of a padding token that gets no gradient
    /// from the lookup is left out: that gradient is not the slope of the loss, by choice. Returns the worse of the two.
    ///
    /// # Errors
    ///
    /// [`Error::GradientMismatch`], core's [`NoGradient`](trainable_tokens_core::Error::NoGradient) if nothing
    /// reaches the rows; candle's errors.
    pub fn check_gradient(&mut self) -> Result<GradientCheck> {
        let start = self.values()?;
        let mut random = ChaCha8Rng::seed_from_u64(self.options.seed);
        let places = self.parts.iter().zip(&start);
        let places = places.map(|(part, values)| {
            if part.matrix().is_factor() {
                Ok(values.clone())
            } else {
                away_from_zero(values, &mut random)
            }
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        part::write_all(&mut self.parts, &places)?;
        let outcome = self.check_here();
        part::write_all(&mut self.parts, &start)?;
        outcome
    }

    /// The check, with all values as they are now.
    fn check_here(&mut self) -> Result<GradientCheck> {
        let batch = self.probe_batch()?;
        let gradients = self.task.loss(&self.model, &batch, Graph::Keep)?.backward()?;
        let mut worst = GradientCheck::default();
        for factors in [false, true] {
            let parts = 0..self.parts.len();
            let chosen: Vec<usize> = parts
                .filter(|at| self.parts[*at].matrix().is_factor() == factors)
                .collect();
            let shortest = if factors { SHORTEST_FACTOR } else { SHORTEST_ROW };
            let check = self.check_parts(&chosen, shortest, &gradients, &batch)?;
            if check.relative_error > worst.relative_error {
                worst = check;
            }
        }
        Ok(worst)
    }

    fn check_parts(
        &mut self,
        chosen: &[usize],
        shortest: f64,
        gradients: &GradStore,
        batch: &Batch,
    ) -> Result<GradientCheck> {
        let precision = match self.model.embedding().table().tensor().dtype() {
            DType::F64 => f64::EPSILON,
            DType::F16 => half::f16::EPSILON.to_f64(),
            DType::BF16 => half::bf16::EPSILON.to_f64(),
            _ => f64::from(f32::EPSILON),
        };
        let held = self.row_without_lookup_gradient();
        let held_of = |part: &Part| held.filter(|_| part.matrix().is_embedding());
        let (mut start, mut slopes) = (Vec::new(), Vec::new());
        for part in chosen.iter().map(|at| &self.parts[*at]) {
            let (values, slope) = (part.read()?, part.gradient(gradients)?);
            let nothing = TokenRows::zeros(slope.dtype(), values.num_rows(), values.embedding_dim());
            slopes.push(with_row(&slope, held_of(part), &nothing)?);
            start.push(values);
        }
        let (model, task, parts) = (&self.model, &self.task, &mut self.parts);
        // A loss is a mean of many rounded terms: a few units in the last place.
        let outcome = check_gradient(
            &start,
            &slopes,
            shortest,
            self.options.seed,
            4.0 * precision,
            |nudged| {
                for ((at, nudged), start) in chosen.iter().zip(nudged).zip(&start) {
                    let part = &mut parts[*at];
                    part.write(&with_row(nudged, held_of(part), start)?)?;
                }
                Ok(scalar(&task.loss(model, batch, Graph::Drop)?)?)
            },
        );
        for (at, start) in chosen.iter().zip(&start) {
            parts[*at].write(start)?;
        }
        outcome
    }

    /// The slot of the padding token, if it trains and the lookup gives it no gradient.
    fn row_without_lookup_gradient(&self) -> Option<Slot> {
        let layer = self.model.embedding().layer();
        let padding = layer.options().padding?;
        let held = padding.rule == PaddingRule::NoLookupGradient;
        held.then(|| layer.tokens().slot(padding.token)).flatten()
    }

    /// The first example of the run that meets a trainable token, or else simply the first: in a tied model, or
    /// with no trainable token in sight, it still says whether the graph is whole. Of a long one, a part around that token.
    fn probe_batch(&self) -> Result<Batch> {
        let tokens = self.model.embedding().tokens();
        let is_trained = |id: &u32| tokens.contains(TokenId(*id));
        // The last token of an example predicts nothing in a causal model.
        let unseen = usize::from(*self.task.objective() == Objective::Causal);
        let meets = |index: usize| {
            let example = self.data.examples().get(index)?;
            example.input_ids.iter().find(|id| is_trained(id))?;
            let batch = self.task.probe(&self.model, &self.data, index).ok()?;
            let seen = &batch.input_ids()[..batch.length() - unseen];
            let at = seen.iter().position(is_trained)?;
            Some((batch, at))
        };
        let found = (0..self.data.examples().len()).find_map(meets);
        let first = || Ok((self.task.probe(&self.model, &self.data, 0)?, 0));
        let (batch, at) = found.map_or_else(first, Ok::<_, Error>)?;
        Ok(self.task.window(&batch, at, PROBE_LENGTH).unwrap_or(batch))
    }
}

/// The rows, but those that are almost zero in random directions, as long as rows mostly are.
///
/// Where a token sees only itself, a row of zeros passes every layer as zeros, and each norm on the way multiplies a nudge by
/// the root of its epsilon's inverse: the loss has a slope there that no step is short enough for. A graph that is cut is cut
/// everywhere.
fn away_from_zero(rows: &TokenRows, random: &mut ChaCha8Rng) -> Result<TokenRows> {
    let [k, dim] = rows.shape();
    let mut values = rows.to_f64_vec();
    for (row, norm) in values.chunks_exact_mut(dim.max(1)).zip(rows.row_norms()) {
        if norm < SHORTEST_ROW {
            row.fill_with(|| random.random_range(-1.0..1.0));
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
    }
    Ok(TokenRows::new::<f64>(values, k, dim)?.to_dtype(rows.dtype()))
}

/// `rows` with the row at `slot` taken from `source`.
fn with_row(rows: &TokenRows, slot: Option<Slot>, source: &TokenRows) -> Result<TokenRows> {
    let Some(Slot(slot)) = slot else {
        return Ok(rows.clone());
    };
    let [k, dim] = rows.shape();
    let (mut values, range) = (rows.to_f64_vec(), slot * dim..(slot + 1) * dim);
    values[range.clone()].copy_from_slice(&source.to_f64_vec()[range]);
    Ok(TokenRows::new::<f64>(values, k, dim)?.to_dtype(rows.dtype()))
}

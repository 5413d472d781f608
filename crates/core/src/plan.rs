//! What one batch asks of the table.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::{
    DType, Element, Error, LayerOptions, Padding, PaddingRule, Result, TokenId, TokenRows, TokenSet,
};

/// Where a batch of `input_ids` meets trainable tokens: one host pass, framework-free, reusable for every layer
/// that shares the token set.
///
/// Every id is checked here, so that no backend has to (on a GPU an id out of range is undefined or fatal).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LookupPlan {
    ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    /// Whether the positions and slots of the gradient are those below and not those above.
    padded: bool,
    live_positions: Vec<u32>,
    live_slots: Vec<u32>,
    /// Whether the factors below count.
    weighted: bool,
    factors: Vec<f64>,
    /// Empty but while the factors are made.
    counts: Vec<u32>,
    num_slots: usize,
    vocab_size: usize,
    token_set: u64,
    /// The adapters whose rows the slots count through, by name and token set, if examples choose among them.
    adapters: Option<Vec<(Arc<str>, u64)>>,
}

impl LookupPlan {
    /// Plans the lookup of `input_ids`, flattened. Of `options`, the padding and `scale_grad_by_freq` count.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] naming the first id that is not below the vocabulary size, the padding token's
    /// before those of the batch; [`Error::Shape`] for more ids than 32 bits can count.
    pub fn new(tokens: &TokenSet, options: LayerOptions, input_ids: &[u32]) -> Result<Self> {
        let mut plan = Self::default();
        plan.rebuild(tokens, options, input_ids)?;
        Ok(plan)
    }

    /// Plans another batch in the buffers of this one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); the plan is then empty.
    pub fn rebuild(&mut self, tokens: &TokenSet, options: LayerOptions, input_ids: &[u32]) -> Result<()> {
        self.reset(tokens.len(), tokens.vocab_size(), tokens.fingerprint());
        self.fill(options, input_ids, |plan| plan.route(tokens, 0, input_ids))
    }

    /// Plans a batch of equally long examples, each of which sees the rows of one adapter or none. The slots count
    /// through the rows of `adapters`, in their order; `choice` holds, for each example, its place among them.
    pub(crate) fn mixed(
        vocab_size: usize,
        options: LayerOptions,
        input_ids: &[u32],
        adapters: &[(&Arc<str>, &TokenSet)],
        choice: &[Option<usize>],
    ) -> Result<Self> {
        let mut plan = Self::default();
        let mut hasher = DefaultHasher::new();
        let mut stacked = Vec::with_capacity(adapters.len());
        let mut offsets = Vec::with_capacity(adapters.len());
        let mut num_slots = 0;
        for (name, tokens) in adapters {
            stacked.push((Arc::clone(name), tokens.fingerprint()));
            offsets.push(num_slots);
            num_slots += tokens.len();
        }
        stacked.hash(&mut hasher);
        plan.reset(num_slots, vocab_size, hasher.finish());
        plan.adapters = Some(stacked);
        let none = TokenSet::new([], vocab_size)?;
        let length = example_len(input_ids.len(), choice.len())?;
        plan.fill(options, input_ids, |plan| {
            for (example, choice) in input_ids.chunks_exact(length.max(1)).zip(choice) {
                match choice.map(|at| (adapters[at].1, offsets[at])) {
                    Some((tokens, offset)) => plan.route(tokens, offset, example)?,
                    None => plan.route(&none, 0, example)?,
                }
            }
            Ok(())
        })?;
        Ok(plan)
    }

    /// Empties the plan, for slots of another kind.
    fn reset(&mut self, num_slots: usize, vocab_size: usize, token_set: u64) {
        self.clear();
        self.num_slots = num_slots;
        self.vocab_size = vocab_size;
        self.token_set = token_set;
        self.adapters = None;
    }

    /// Fills an empty plan by `route`; it is empty again if that fails.
    fn fill(
        &mut self,
        options: LayerOptions,
        input_ids: &[u32],
        route: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        if u32::try_from(input_ids.len()).is_err() {
            let (most, got) = ([u32::MAX as usize], [input_ids.len()]);
            return Err(Error::shape("input_ids", &most, &got));
        }
        if let Some(Padding { token, .. }) = options.padding
            && token.row() >= self.vocab_size
        {
            return Err(Error::TokenOutOfRange {
                id: i64::from(token.0),
                vocab_size: self.vocab_size,
            });
        }
        if let Err(error) = route(self) {
            self.clear();
            return Err(error);
        }
        if let Some(padding) = options.padding {
            self.drop_padding(padding);
        }
        if options.scale_grad_by_freq {
            self.weigh_by_frequency();
        }
        Ok(())
    }

    /// Appends ids, with the slots of those that are among `tokens` counted from `offset`.
    fn route(&mut self, tokens: &TokenSet, offset: usize, ids: &[u32]) -> Result<()> {
        // Slots and positions fit 32 bits: there are no more of them than ids, or than rows of adapters in memory.
        #[expect(clippy::cast_possible_truncation, reason = "checked before")]
        let (offset, start) = (offset as u32, self.ids.len() as u32);
        for (position, &id) in (start..).zip(ids) {
            if let Some(slot) = tokens.slot_index(id)? {
                self.positions.push(position);
                self.slots.push(offset + slot);
            }
        }
        self.ids.extend_from_slice(ids);
        Ok(())
    }

    /// torch's rule: the padding token's positions get no gradient. A second list exists only when it differs.
    fn drop_padding(&mut self, padding: Padding) {
        let ids = &self.ids;
        let padded = |position: &u32| ids[*position as usize] == padding.token.0;
        if padding.rule == PaddingRule::NoLookupGradient && self.positions.iter().any(padded) {
            let all = self.positions.iter().zip(&self.slots);
            for (position, slot) in all.filter(|(position, _)| !padded(position)) {
                self.live_positions.push(*position);
                self.live_slots.push(*slot);
            }
            self.padded = true;
        }
    }

    /// torch's `scale_grad_by_freq`: one over the count of the id in the batch.
    fn weigh_by_frequency(&mut self) {
        self.counts.resize(self.num_slots, 0);
        for slot in &self.slots {
            self.counts[*slot as usize] += 1;
        }
        let live = if self.padded {
            &self.live_slots
        } else {
            &self.slots
        };
        let factors = live
            .iter()
            .map(|slot| 1.0 / f64::from(self.counts[*slot as usize]));
        self.factors.extend(factors);
        self.counts.clear();
        self.weighted = true;
    }

    fn clear(&mut self) {
        for indices in [
            &mut self.ids,
            &mut self.positions,
            &mut self.slots,
            &mut self.live_positions,
            &mut self.live_slots,
        ] {
            indices.clear();
        }
        self.factors.clear();
        (self.padded, self.weighted) = (false, false);
    }

    /// Refuses a plan that was made for another token set.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPlan`].
    pub fn expect_tokens(&self, tokens: &TokenSet) -> Result<()> {
        if self.adapters.is_none() && self.token_set == tokens.fingerprint() {
            return Ok(());
        }
        Err(Error::ForeignPlan)
    }

    /// Refuses a plan that a table of `vocab_size` rows and, if there are any, `num_rows` trained ones cannot serve: for
    /// backends to call first. It costs nothing but for a plan that was made for a larger vocabulary.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] naming the first id that is not below `vocab_size`, [`Error::Shape`] for another
    /// number of slots.
    pub fn expect_fits(&self, vocab_size: usize, num_rows: Option<usize>) -> Result<()> {
        if self.vocab_size > vocab_size
            && let Some(id) = self.token_ids().find(|id| id.row() >= vocab_size)
        {
            let id = i64::from(id.0);
            return Err(Error::TokenOutOfRange { id, vocab_size });
        }
        match num_rows {
            Some(rows) if rows != self.num_slots => {
                Err(Error::shape("slots of the plan", &[rows], &[self.num_slots]))
            }
            _ => Ok(()),
        }
    }

    /// The adapters that the examples of a mixed batch choose among, by name and token set; `None` for any other plan.
    pub(crate) fn adapters(&self) -> Option<&[(Arc<str>, u64)]> {
        self.adapters.as_deref()
    }

    /// The flattened `input_ids`, all below the vocabulary size.
    pub fn input_ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many ids the batch has (`N`).
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// How many slots the token set has (`k`).
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Positions in the batch that hold a trainable token, ascending.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The slot at each of [`positions`](Self::positions); slots repeat.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Positions whose gradient reaches the trained rows, ascending: [`positions`](Self::positions) less those of
    /// a padding token under torch's rule.
    pub fn grad_positions(&self) -> &[u32] {
        if self.padded {
            &self.live_positions
        } else {
            &self.positions
        }
    }

    /// The slot at each of [`grad_positions`](Self::grad_positions).
    pub fn grad_slots(&self) -> &[u32] {
        if self.padded {
            &self.live_slots
        } else {
            &self.slots
        }
    }

    /// What the gradient at each of [`grad_positions`](Self::grad_positions) is multiplied by, under
    /// `scale_grad_by_freq`; otherwise there are no factors.
    pub fn grad_factors(&self) -> Option<&[f64]> {
        self.weighted.then_some(&self.factors)
    }

    /// Adds the gradient of a lookup's output, `[N, D]` row-major, into that of the trained rows, `[k, D]`: the
    /// rows of equal slots are summed in batch order, each multiplied by `factor` (the embedding's scale) and by
    /// its own of [`grad_factors`](Self::grad_factors).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a slice has another length, [`Error::DType`] if `gradient` is not in the type that `T` computes in.
    pub fn accumulate<T: Element>(
        &self,
        output_gradient: &[T],
        factor: Option<f64>,
        gradient: &mut TokenRows,
    ) -> Result<()> {
        let dim = gradient.embedding_dim();
        gradient.expect_shape("gradient of the trained rows", self.num_slots, dim)?;
        if output_gradient.len() != self.len() * dim {
            return Err(Error::shape(
                "gradient of the lookup",
                &[self.len(), dim],
                &[output_gradient.len()],
            ));
        }
        let (expected, got) = (T::Compute::DTYPE, gradient.dtype());
        let what = "gradient of the trained rows";
        let sums = gradient
            .as_mut_slice::<T::Compute>()
            .ok_or(Error::DType { what, expected, got })?;
        let factor = factor.map(T::Compute::from_f64);
        for (at, (&position, &slot)) in self.grad_positions().iter().zip(self.grad_slots()).enumerate() {
            let own = self.grad_factors().map(|own| T::Compute::from_f64(own[at]));
            let factor = match (factor, own) {
                (Some(factor), Some(own)) => Some(factor * own),
                (factor, own) => factor.or(own),
            };
            let from = &output_gradient[position as usize * dim..][..dim];
            let to = &mut sums[slot as usize * dim..][..dim];
            add_row(to, from, factor);
        }
        Ok(())
    }

    /// A zero gradient of the trained rows in the type that gradients of rows of type `dtype` accumulate in.
    pub fn zero_gradient(&self, dtype: DType, embedding_dim: usize) -> TokenRows {
        TokenRows::zeros(dtype.default_row_dtype(), self.num_slots, embedding_dim)
    }

    /// The ids of the batch as [`TokenId`]s.
    pub fn token_ids(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.ids.iter().map(|id| TokenId(*id))
    }
}

/// Adds a row to a sum, each element times `factor`; half precision is widened by slices.
fn add_row<T: Element>(sums: &mut [T::Compute], row: &[T], factor: Option<T::Compute>) {
    if T::DTYPE as u8 == T::Compute::DTYPE as u8 {
        let row = sums.iter_mut().zip(row);
        match factor {
            None => row.for_each(|(sum, x)| *sum += x.to_compute()),
            Some(factor) => row.for_each(|(sum, x)| *sum += x.to_compute() * factor),
        }
        return;
    }
    let mut wide = [T::Compute::default(); 128];
    for (sums, row) in sums.chunks_mut(wide.len()).zip(row.chunks(wide.len())) {
        T::to_compute_slice(row, &mut wide);
        add_row(sums, &wide[..row.len()], factor);
    }
}

/// How long each of `examples` equally long examples is.
pub(crate) fn example_len(rows: usize, examples: usize) -> Result<usize> {
    match rows.checked_div(examples) {
        Some(length) if length * examples == rows => Ok(length),
        None if rows == 0 => Ok(0),
        _ => Err(Error::shape("examples of a mixed batch", &[examples], &[rows])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> TokenSet {
        TokenSet::new([7, 2, 5], 9).unwrap()
    }

    #[test]
    fn positions_ascend_and_slots_repeat() {
        let plan = LookupPlan::new(&tokens(), LayerOptions::default(), &[5, 0, 7, 5, 8]).unwrap();
        assert_eq!(plan.positions(), [0, 2, 3]);
        assert_eq!(plan.slots(), [2, 0, 2]);
        assert_eq!(plan.grad_positions(), plan.positions());
    }

    #[test]
    fn torchs_padding_rule_drops_the_gradient_only() {
        let rule = |rule| LayerOptions {
            padding: Some(Padding {
                token: TokenId(5),
                rule,
            }),
            ..LayerOptions::default()
        };
        let plan = LookupPlan::new(&tokens(), rule(PaddingRule::NoLookupGradient), &[5, 7, 5]).unwrap();
        assert_eq!(
            (plan.positions(), plan.grad_positions(), plan.grad_slots()),
            (&[0, 1, 2][..], &[1][..], &[0][..])
        );
        let plan = LookupPlan::new(&tokens(), rule(PaddingRule::Train), &[5, 7, 5]).unwrap();
        assert_eq!(plan.grad_positions(), [0, 1, 2]);
    }

    #[test]
    fn frequent_ids_count_less() {
        let options = LayerOptions {
            scale_grad_by_freq: true,
            ..LayerOptions::default()
        };
        let plan = LookupPlan::new(&tokens(), options, &[5, 0, 7, 5]).unwrap();
        assert_eq!(plan.grad_factors(), Some(&[0.5, 1.0, 0.5][..]));
        let mut gradient = TokenRows::zeros(DType::F64, 3, 1);
        plan.accumulate(&[1f64, 10.0, 100.0, 1000.0], Some(2.0), &mut gradient)
            .unwrap();
        assert_eq!(gradient.to_f64_vec(), [200.0, 0.0, 1001.0]);
    }

    #[test]
    fn an_id_out_of_range_empties_the_plan() {
        let mut plan = LookupPlan::new(&tokens(), LayerOptions::default(), &[5, 7]).unwrap();
        let error = plan
            .rebuild(&tokens(), LayerOptions::default(), &[5, 9])
            .unwrap_err();
        assert_eq!(error, Error::TokenOutOfRange { id: 9, vocab_size: 9 });
        assert!(plan.is_empty() && plan.positions().is_empty());
    }

    #[test]
    fn a_plan_belongs_to_its_token_set() {
        let plan = LookupPlan::new(&tokens(), LayerOptions::default(), &[5]).unwrap();
        plan.expect_tokens(&TokenSet::new([7, 2, 5], 9).unwrap()).unwrap();
        for (ids, vocab_size) in [([2, 7, 5], 9), ([7, 2, 6], 9), ([7, 2, 5], 8)] {
            let other = TokenSet::new(ids, vocab_size).unwrap();
            assert_eq!(plan.expect_tokens(&other), Err(Error::ForeignPlan));
        }
    }

    #[test]
    fn a_plan_fits_tables_that_have_its_rows() {
        let plan = LookupPlan::new(&tokens(), LayerOptions::default(), &[5, 0, 7]).unwrap();
        for (vocab_size, num_rows) in [(9, None), (9, Some(3)), (12, Some(3)), (8, Some(3))] {
            plan.expect_fits(vocab_size, num_rows).unwrap();
        }
        let error = plan.expect_fits(7, Some(3)).unwrap_err();
        assert_eq!(error, Error::TokenOutOfRange { id: 7, vocab_size: 7 });
        let error = plan.expect_fits(9, Some(2)).unwrap_err();
        assert_eq!(error, Error::shape("slots of the plan", &[2], &[3]));
    }

    #[test]
    fn padding_outside_the_vocabulary_is_refused() {
        let padding = Padding {
            token: TokenId(9),
            rule: PaddingRule::Train,
        };
        let options = LayerOptions {
            padding: Some(padding),
            ..LayerOptions::default()
        };
        let error = LookupPlan::new(&tokens(), options, &[5]).unwrap_err();
        assert_eq!(error, Error::TokenOutOfRange { id: 9, vocab_size: 9 });
    }

    #[test]
    fn repeats_are_summed_in_batch_order() {
        let plan = LookupPlan::new(&tokens(), LayerOptions::default(), &[5, 0, 5]).unwrap();
        let mut gradient = TokenRows::zeros(DType::F32, 3, 2);
        plan.accumulate(&[1f32, 2.0, 10.0, 20.0, 100.0, 200.0], None, &mut gradient)
            .unwrap();
        plan.accumulate(&[1f32, 1.0, 0.0, 0.0, 0.0, 0.0], Some(0.5), &mut gradient)
            .unwrap();
        assert_eq!(
            gradient.as_slice::<f32>().unwrap(),
            [0.0, 0.0, 0.0, 0.0, 101.5, 202.5]
        );
        assert!(plan.accumulate(&[1f32; 4], None, &mut gradient).is_err());
        assert!(plan.accumulate(&[1f64; 6], None, &mut gradient).is_err());
    }
}

//! Batches whose examples use different adapters.

use std::ops::Range;

use super::{ActiveRows, TrainableTokens};
use crate::adapter::TokenAdapter;
use crate::plan::example_len;
use crate::{Backend, EmbeddingSource, Error, LookupPlan, Result, RowMix, TokenSet};

/// The adapters of a mixed batch.
struct Chosen<'a, B: Backend> {
    /// Each of them once, in the order of their first use.
    used: Vec<&'a TokenAdapter<B>>,
    /// The place of each example's among them.
    choice: Vec<Option<usize>>,
}

/// Rows of a mixed batch and the adapter whose rows they see.
pub type MixedPart<'a, B> = (Range<usize>, Option<&'a TokenAdapter<B>>);

impl<B: Backend> TrainableTokens<B> {
    /// Plans a batch of `adapters.len()` equally long examples, flattened, each of which sees the rows of the adapter of
    /// its name, or the base's alone. The adapters need not be active.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`], [`Error::UnknownAdapter`]; [`Error::Shape`] if the ids are not equally long examples.
    pub fn plan_mixed(&self, input_ids: &[u32], adapters: &[Option<&str>]) -> Result<LookupPlan> {
        let Chosen { used, choice } = self.choose(adapters)?;
        let used = used
            .iter()
            .map(|adapter| (adapter.shared_name(), adapter.tokens()));
        let used: Vec<_> = used.collect();
        LookupPlan::mixed(self.source.vocab_size(), self.options, input_ids, &used, &choice)
    }

    /// The rows of a mixed batch: `[N, D]` in the table's element type, scaled. See [`plan_mixed`](Self::plan_mixed).
    ///
    /// # Errors
    ///
    /// Those of [`plan_mixed`](Self::plan_mixed); [`Error::AlreadyMerged`] and [`Error::Disabled`]; the backend's errors.
    pub fn lookup_mixed(&self, input_ids: &[u32], adapters: &[Option<&str>]) -> Result<B::Tensor, B::Error> {
        self.lookup_planned(&self.plan_mixed(input_ids, adapters)?)
    }

    /// The logits of a mixed batch by a head that shares the table: `hidden` `[N, D]` to `[N, V]`, where the rows of
    /// `hidden` are those of `adapters.len()` equally long examples. See [`plan_mixed`](Self::plan_mixed).
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`], [`Error::AlreadyMerged`], [`Error::Disabled`]; [`Error::Shape`] if the rows are not
    /// equally long examples; the backend's errors.
    pub fn logits_mixed(&self, hidden: B::Tensor, adapters: &[Option<&str>]) -> Result<B::Tensor, B::Error> {
        let parts = self.mixed_parts(B::num_rows(&hidden), adapters)?;
        let none = TokenSet::new([], self.source.vocab_size())?;
        if parts.is_empty() {
            return B::logits(hidden, &self.source, None, &none);
        }
        let (ranges, adapters): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let hidden = B::split_rows(hidden, &ranges)?;
        let logits = hidden.into_iter().zip(adapters).map(|(hidden, adapter)| {
            let tokens = adapter.map_or(&none, TokenAdapter::tokens);
            let delta = adapter.filter(|_| !tokens.is_empty()).map(TokenAdapter::delta);
            B::logits(hidden, &self.source, delta, tokens)
        });
        B::join_rows(logits.collect::<Result<_, _>>()?)
    }

    /// The rows of a mixed batch of `num_rows` rows, in runs that use the same adapter, without gaps: for a head's own
    /// passes, forward or backward.
    ///
    /// # Errors
    ///
    /// Those of [`logits_mixed`](Self::logits_mixed), but the backend's.
    pub fn mixed_parts(&self, num_rows: usize, adapters: &[Option<&str>]) -> Result<Vec<MixedPart<'_, B>>> {
        self.expect_mixable()?;
        let Chosen { used, choice } = self.choose(adapters)?;
        let length = example_len(num_rows, adapters.len())?;
        let mut start = 0;
        let runs = choice.chunk_by(PartialEq::eq).map(|run| {
            let rows = start..start + run.len() * length;
            start = rows.end;
            (rows, run[0].map(|at| used[at]))
        });
        Ok(runs.collect())
    }

    /// The rows that a plan's slots count through; none if the lookup is the table's own.
    ///
    /// # Errors
    ///
    /// Those of [`lookup_planned`](Self::lookup_planned).
    pub fn rows_for(&self, plan: &LookupPlan) -> Result<Option<ActiveRows<'_, B::Delta>>, B::Error> {
        let Some(adapters) = plan.adapters() else {
            plan.expect_tokens(self.tokens())?;
            return self.active();
        };
        self.expect_mixable()?;
        let mut deltas = Vec::with_capacity(adapters.len());
        for (name, tokens) in adapters {
            let adapter = self.adapter(name)?;
            if adapter.tokens().fingerprint() != *tokens {
                return Err(Error::ForeignPlan.into());
            }
            deltas.push((adapter.delta(), adapter.tokens().len()));
        }
        if plan.num_slots() == 0 {
            return Ok(None);
        }
        let (deltas, part_rows): (Vec<_>, Vec<_>) = deltas.into_iter().unzip();
        Ok(Some(match deltas[..] {
            [delta] => ActiveRows::Leaf(delta),
            _ => ActiveRows::Combined(B::combine(&deltas, &RowMix::stack(part_rows)?)?),
        }))
    }

    fn choose(&self, names: &[Option<&str>]) -> Result<Chosen<'_, B>> {
        let mut used: Vec<&TokenAdapter<B>> = Vec::new();
        let mut choice = Vec::with_capacity(names.len());
        for name in names {
            let Some(name) = name else {
                choice.push(None);
                continue;
            };
            let known = used.iter().position(|adapter| adapter.name() == *name);
            choice.push(Some(known.unwrap_or(used.len())));
            if known.is_none() {
                used.push(self.adapter(name)?);
            }
        }
        Ok(Chosen { used, choice })
    }

    /// An example without an adapter must see the base, and merged rows are everyone's.
    fn expect_mixable(&self) -> Result<()> {
        self.expect_none_merged()?;
        if self.enabled {
            Ok(())
        } else {
            Err(Error::Disabled)
        }
    }
}

//! Adapters by name: which there are and which are active.

use std::sync::Arc;

use super::{ActiveSet, Effective, NamedTokens, TrainableTokens};
use crate::active::expect_disjoint;
use crate::{Backend, EmbeddingSource, Error, Overlap, Result, TokenAdapter, TokenRows, TokenSet};

impl<B: Backend> TrainableTokens<B> {
    /// Adds an adapter from the base's own rows, in the type of
    /// [`DType::default_row_dtype`](crate::DType::default_row_dtype). It is not active yet.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterName`] if the name is taken or cannot be one; [`Error::Shape`] if `tokens` was validated against
    /// another vocabulary size; [`Error::AlreadyMerged`] while the table holds merged rows; the backend's errors.
    pub fn add_adapter(&mut self, name: &str, tokens: TokenSet) -> Result<(), B::Error> {
        self.expect_vocabulary(&tokens)?;
        self.expect_none_merged()?;
        let rows = self.source.read_rows(tokens.ids())?;
        let rows = rows.to_dtype(self.source.dtype().default_row_dtype());
        self.add_adapter_with_rows(name, tokens, &rows)
    }

    /// Adds an adapter from given rows, `[k, D]` in slot order; they train in their own element type. It is not active yet.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterName`] if the name is taken or cannot be one; [`Error::Shape`] if the rows or the vocabulary do not
    /// fit the table; the backend's errors.
    pub fn add_adapter_with_rows(
        &mut self,
        name: &str,
        tokens: TokenSet,
        rows: &TokenRows,
    ) -> Result<(), B::Error> {
        self.expect_vocabulary(&tokens)?;
        rows.expect_shape("trained rows", tokens.len(), self.source.embedding_dim())?;
        let delta = B::delta(&self.source, rows)?;
        Ok(self.push_adapter(TokenAdapter::new(name, tokens, delta)?)?)
    }

    /// Removes an adapter and hands it over.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`]; [`Error::AdapterActive`] and [`Error::AlreadyMerged`] while its rows are in use.
    pub fn delete_adapter(&mut self, name: &str) -> Result<TokenAdapter<B>> {
        let at = self.place(name)?;
        self.adapters[at].expect_unmerged()?;
        if self.active.iter().any(|active| **active == *name) {
            let name = name.to_owned();
            return Err(Error::AdapterActive { name });
        }
        let adapter = self.adapters.remove(at);
        // Places moved. The same adapters are active as before, so this cannot fail.
        self.effective = self.effective_of(&self.active, &self.overlap)?;
        Ok(adapter)
    }

    /// Makes these adapters the active ones, in place of those that were. With none, outputs are the base's. Their tokens
    /// must be disjoint; see [`activate_overlapping`](Self::activate_overlapping) for others.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`], [`Error::AdapterName`] for a name given twice, [`Error::Overlap`].
    pub fn activate(&mut self, names: &[&str]) -> Result<()> {
        self.activate_overlapping(names, Overlap::Refuse)
    }

    /// Makes these adapters the active ones, with a choice of what counts for tokens that several of them train. Merged
    /// adapters cannot share tokens with other active ones, unless the last one wins: the rows in the table lose.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`], [`Error::AdapterName`] for a name given twice, [`Error::Overlap`]; [`Error::Shape`] and
    /// [`Error::Hyperparameter`] for weights that are not one positive number for each adapter.
    pub fn activate_overlapping(&mut self, names: &[&str], overlap: Overlap) -> Result<()> {
        let places = self.places(names)?;
        let names = places
            .iter()
            .map(|at| Arc::clone(self.adapters[*at].shared_name()));
        let names: Vec<_> = names.collect();
        overlap.expect_weights(places.len())?;
        let merged = |at: usize| self.adapters[at].is_merged();
        if places.iter().any(|at| merged(*at)) {
            // What is in effect is only a part of them then.
            self.named_set(&places, &overlap)?;
        }
        let effective = self.effective_of(&names, &overlap)?;
        if overlap != Overlap::LastWins {
            self.expect_apart(&places, merged)?;
        }
        self.effective = effective;
        self.active = names;
        self.overlap = overlap;
        Ok(())
    }

    /// Makes every output that of the base until [`enable`](Self::enable); the active adapters stay the active ones.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyMerged`]: rows in the table cannot be left out; unmerge them first.
    pub fn disable(&mut self) -> Result<()> {
        self.expect_none_merged()?;
        self.enabled = false;
        Ok(())
    }

    /// Ends what [`disable`](Self::disable) began.
    pub fn enable(&mut self) {
        self.enabled = true;
    }

    /// Whether active adapters are used.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The adapters, in the order in which they were added.
    pub fn adapters(&self) -> impl Iterator<Item = &TokenAdapter<B>> {
        self.adapters.iter()
    }

    /// Names of the active adapters, in their order.
    pub fn active_names(&self) -> impl Iterator<Item = &str> {
        self.active.iter().map(|name| &**name)
    }

    /// What counts for tokens that several active adapters train.
    pub fn overlap(&self) -> &Overlap {
        &self.overlap
    }

    /// The adapter of a name.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> Result<&TokenAdapter<B>> {
        Ok(&self.adapters[self.place(name)?])
    }

    /// The adapter of a name, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownAdapter`].
    pub fn adapter_mut(&mut self, name: &str) -> Result<&mut TokenAdapter<B>> {
        let at = self.place(name)?;
        Ok(&mut self.adapters[at])
    }

    /// The one active adapter.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`].
    pub fn active_adapter(&self) -> Result<&TokenAdapter<B>> {
        self.adapter(self.only_active()?)
    }

    /// The one active adapter, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`].
    pub fn active_adapter_mut(&mut self) -> Result<&mut TokenAdapter<B>> {
        let at = self.place(self.only_active()?)?;
        Ok(&mut self.adapters[at])
    }

    fn only_active(&self) -> Result<&str> {
        match &self.active[..] {
            [name] => Ok(name),
            _ => Err(Error::NotOneActive {
                active: self.active_names().map(str::to_owned).collect(),
            }),
        }
    }

    pub(super) fn place(&self, name: &str) -> Result<usize> {
        let found = self.adapters.iter().position(|adapter| adapter.name() == name);
        found.ok_or_else(|| Error::UnknownAdapter {
            name: name.to_owned(),
            known: self.adapters().map(|adapter| adapter.name().to_owned()).collect(),
        })
    }

    /// The places of adapters, none of which may be named twice.
    pub(super) fn places(&self, names: &[&str]) -> Result<Vec<usize>> {
        let mut places = Vec::with_capacity(names.len());
        for name in names {
            let at = self.place(name)?;
            if places.contains(&at) {
                let (name, must) = ((*name).to_owned(), "given once");
                return Err(Error::AdapterName { name, must });
            }
            places.push(at);
        }
        Ok(places)
    }

    /// Refuses tokens that these adapters share with others that count.
    pub(super) fn expect_apart(&self, places: &[usize], counts: impl Fn(usize) -> bool) -> Result<()> {
        for other in (0..self.adapters.len()).filter(|at| counts(*at)) {
            for place in places.iter().filter(|place| **place != other) {
                expect_disjoint(named(&self.adapters[other]), named(&self.adapters[*place]))?;
            }
        }
        Ok(())
    }

    pub(super) fn named_set(&self, places: &[usize], overlap: &Overlap) -> Result<ActiveSet> {
        let adapters: Vec<_> = places.iter().map(|at| named(&self.adapters[*at])).collect();
        ActiveSet::new(&adapters, overlap, self.source.vocab_size())
    }

    /// What outputs are made with if these adapters are active.
    pub(super) fn effective_of(&self, active: &[Arc<str>], overlap: &Overlap) -> Result<Effective> {
        let places = active.iter().map(|name| self.place(name));
        let places = places.collect::<Result<Vec<_>>>()?;
        let apart = |at: &usize| !self.adapters[*at].is_merged();
        let all_merged = !places.iter().any(apart);
        let kept = |at: &usize| all_merged || apart(at);
        let overlap = &overlap.among((0..places.len()).filter(|at| kept(&places[*at])));
        let places: Vec<_> = places.iter().copied().filter(kept).collect();
        Ok(match places[..] {
            [] => Effective::None(TokenSet::new([], self.source.vocab_size())?),
            [at] => Effective::One(at),
            _ => {
                let sets = places.iter().map(|at| self.adapters[*at].tokens().fingerprint());
                let known = self.known.get(&sets.collect::<Vec<_>>(), overlap);
                let set = match known {
                    Some(known) => Arc::clone(known),
                    None => Arc::new(self.named_set(&places, overlap)?),
                };
                Effective::Several(places, set)
            }
        })
    }

    pub(super) fn expect_none_merged(&self) -> Result<()> {
        self.adapters.iter().try_for_each(TokenAdapter::expect_unmerged)
    }

    pub(super) fn expect_vocabulary(&self, tokens: &TokenSet) -> Result<()> {
        let (expected, got) = (self.source.vocab_size(), tokens.vocab_size());
        if expected == got {
            return Ok(());
        }
        Err(Error::shape("vocabulary of the token set", &[expected], &[got]))
    }
}

fn named<B: Backend>(adapter: &TokenAdapter<B>) -> NamedTokens<'_> {
    (adapter.shared_name(), adapter.tokens())
}

//! Adapters by name: which there are, which are active, and which are in the table.

use std::sync::Arc;

use trainable_tokens_core::{
    Error as CoreError, MergeCheck, Overlap, TokenAdapter as CoreAdapter, TokenRows, TokenSet,
    TrainableTokens as CoreLayer,
};

use super::{MergedRows, TrainableTokens};
use crate::{AdapterMut, AdapterRef, Burn, Result};

impl TrainableTokens {
    /// Adds an adapter from the base's own rows, in at least `f32`. It is not active yet.
    ///
    /// # Errors
    ///
    /// Those of core's [`add_adapter`](CoreLayer::add_adapter).
    pub fn add_adapter(&mut self, name: &str, tokens: TokenSet) -> Result<()> {
        self.change(|layer| layer.add_adapter(name, tokens))
    }

    /// Adds an adapter from given rows, `[k, D]` in slot order; they train in their own element type. It is not active yet.
    ///
    /// # Errors
    ///
    /// Those of core's [`add_adapter_with_rows`](CoreLayer::add_adapter_with_rows).
    pub fn add_adapter_with_rows(&mut self, name: &str, tokens: TokenSet, rows: &TokenRows) -> Result<()> {
        self.change(|layer| layer.add_adapter_with_rows(name, tokens, rows))
    }

    /// Removes an adapter and hands it over.
    ///
    /// # Errors
    ///
    /// [`CoreError::UnknownAdapter`]; [`CoreError::AdapterActive`] and [`CoreError::AlreadyMerged`] while its rows are in use.
    pub fn delete_adapter(&mut self, name: &str) -> Result<CoreAdapter<Burn>> {
        self.change(|layer| Ok(layer.delete_adapter(name)?))
    }

    /// Makes these adapters the active ones, in place of those that were. With none, outputs are the base's. Their tokens
    /// must be disjoint; see [`activate_overlapping`](Self::activate_overlapping) for others.
    ///
    /// # Errors
    ///
    /// [`CoreError::UnknownAdapter`], [`CoreError::AdapterName`] for a name given twice, [`CoreError::Overlap`].
    pub fn activate(&mut self, names: &[&str]) -> Result<()> {
        self.change(|layer| Ok(layer.activate(names)?))
    }

    /// Makes these adapters the active ones, with a choice of what counts for tokens that several of them train.
    ///
    /// # Errors
    ///
    /// Those of core's [`activate_overlapping`](CoreLayer::activate_overlapping).
    pub fn activate_overlapping(&mut self, names: &[&str], overlap: Overlap) -> Result<()> {
        self.change(|layer| Ok(layer.activate_overlapping(names, overlap)?))
    }

    /// Makes every output that of the base until [`enable`](Self::enable); the active adapters stay the active ones.
    ///
    /// # Errors
    ///
    /// [`CoreError::AlreadyMerged`]: rows in the table cannot be left out; unmerge them first.
    pub fn disable(&mut self) -> Result<()> {
        self.change(|layer| Ok(layer.disable()?))
    }

    /// Ends what [`disable`](Self::disable) began.
    pub fn enable(&mut self) {
        self.state.disabled = false;
    }

    /// Whether active adapters are used.
    pub fn is_enabled(&self) -> bool {
        !self.state.disabled
    }

    /// The adapters, in the order in which they were added.
    pub fn adapters(&self) -> impl Iterator<Item = AdapterRef<'_>> {
        self.adapters.iter().map(|adapter| AdapterRef::new(self, adapter))
    }

    /// Names of the active adapters, in their order.
    pub fn active_names(&self) -> impl Iterator<Item = &str> {
        self.state.active.iter().map(|name| &**name)
    }

    /// What counts for tokens that several active adapters train.
    pub fn overlap(&self) -> &Overlap {
        &self.state.overlap
    }

    /// The adapter of a name.
    ///
    /// # Errors
    ///
    /// [`CoreError::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> Result<AdapterRef<'_>> {
        let at = self.place(name)?;
        Ok(AdapterRef::new(self, &self.adapters[at]))
    }

    /// The adapter of a name, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// [`CoreError::UnknownAdapter`].
    pub fn adapter_mut(&mut self, name: &str) -> Result<AdapterMut<'_>> {
        let at = self.place(name)?;
        let name = Arc::clone(self.adapters[at].shared_name());
        Ok(AdapterMut::new(self, name))
    }

    /// The one active adapter.
    ///
    /// # Errors
    ///
    /// [`CoreError::NotOneActive`].
    pub fn active_adapter(&self) -> Result<AdapterRef<'_>> {
        let at = self.active_at()?;
        Ok(AdapterRef::new(self, &self.adapters[at]))
    }

    /// Writes the rows of the active adapters into the table, rounded to its element type; the old rows are kept for
    /// [`unmerge`](Self::unmerge). From then on this layer and its head use the table alone.
    ///
    /// The table is written in place if this layer holds the only handle on it. If other modules share it, the layer gets a
    /// copy of its own first, and the others keep the old rows: burn's tensors are values. [`embedding`](Self::embedding)
    /// is the merged one, to be given to them.
    ///
    /// # Errors
    ///
    /// Those of [`merge_adapters`](Self::merge_adapters).
    pub fn merge(&mut self) -> Result<()> {
        self.change(CoreLayer::merge)
    }

    /// As [`merge`](Self::merge), after a check of the rows that are written.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge); [`CoreError::NonFinite`] by the check.
    pub fn merge_checked(&mut self, check: MergeCheck) -> Result<()> {
        self.change(|layer| layer.merge_checked(check))
    }

    /// Writes the rows of these adapters into the table, active or not. `overlap` is what counts for tokens that several of
    /// them train, or that rows already merged are for.
    ///
    /// # Errors
    ///
    /// Those of core's [`merge_adapters`](CoreLayer::merge_adapters).
    pub fn merge_adapters(&mut self, names: &[&str], overlap: &Overlap, check: MergeCheck) -> Result<()> {
        self.change(|layer| layer.merge_adapters(names, overlap, check))
    }

    /// Restores the exact rows that the latest merge overwrote.
    ///
    /// # Errors
    ///
    /// If nothing is merged, or burn fails.
    pub fn unmerge(&mut self) -> Result<()> {
        self.change_merged(CoreLayer::unmerge)
    }

    /// Whether the table holds rows of an adapter.
    pub fn is_merged(&self) -> bool {
        !self.merges.is_empty()
    }

    /// Names of the adapters of each merge that was not undone, the latest last.
    pub fn merges(&self) -> impl DoubleEndedIterator<Item = impl Iterator<Item = &str>> {
        self.merges.iter().map(MergedRows::adapters)
    }

    pub(super) fn active_at(&self) -> Result<usize> {
        match &self.state.active[..] {
            [name] => self.place(name),
            names => {
                let active = names.iter().map(|name| (**name).to_owned()).collect();
                Err(CoreError::NotOneActive { active }.into())
            }
        }
    }

    fn place(&self, name: &str) -> Result<usize> {
        let found = self.adapters.iter().position(|adapter| adapter.name() == name);
        let unknown = || CoreError::UnknownAdapter {
            name: name.to_owned(),
            known: self.adapters.iter().map(|it| it.name().to_owned()).collect(),
        };
        found.ok_or_else(|| unknown().into())
    }
}

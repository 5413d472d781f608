//! Adapters by name: which there are, which are active, and which are merged.

use std::ops::Deref;

use parking_lot::RwLockReadGuard;
use trainable_tokens_core::{
    EmbeddingSource, MergeCheck, Overlap, TokenAdapter, TokenRows, TokenSet, TrainableTokens as CoreLayer,
};

use super::TrainableTokens;
use crate::{AdapterMut, Candle, Result};

impl TrainableTokens {
    /// Adds an adapter of the rows `token_ids`, from where they are. It is not active yet.
    ///
    /// # Errors
    ///
    /// For a name that is taken or cannot be one, an id out of range or given twice, and while merged.
    pub fn add_adapter(&mut self, name: &str, token_ids: &[u32]) -> Result<()> {
        let tokens = self.token_set(token_ids)?;
        self.layer.write().add_adapter(name, tokens)
    }

    /// Adds an adapter of the rows `token_ids` with given rows `[k, D]`, in their element type. It is not active yet.
    ///
    /// # Errors
    ///
    /// For a name that is taken or cannot be one, an id out of range or given twice, and rows of another shape.
    pub fn add_adapter_with_rows(&mut self, name: &str, token_ids: &[u32], rows: &TokenRows) -> Result<()> {
        let tokens = self.token_set(token_ids)?;
        self.layer.write().add_adapter_with_rows(name, tokens, rows)
    }

    fn token_set(&self, token_ids: &[u32]) -> Result<TokenSet> {
        let vocab_size = self.table().vocab_size();
        Ok(TokenSet::new(token_ids.iter().copied(), vocab_size)?)
    }

    /// Removes an adapter and hands it over.
    ///
    /// # Errors
    ///
    /// For an unknown adapter, and one that is active or merged.
    pub fn delete_adapter(&mut self, name: &str) -> Result<TokenAdapter<Candle>> {
        Ok(self.layer.write().delete_adapter(name)?)
    }

    /// Makes these adapters the active ones, in place of those that were; with none, outputs are the base's. Their tokens
    /// must be disjoint.
    ///
    /// # Errors
    ///
    /// For an unknown adapter, one given twice, and a token that two of them train.
    pub fn activate(&mut self, names: &[&str]) -> Result<()> {
        Ok(self.layer.write().activate(names)?)
    }

    /// Makes these adapters the active ones, with a choice of what counts for tokens that several of them train.
    ///
    /// # Errors
    ///
    /// Those of [`CoreLayer::activate_overlapping`].
    pub fn activate_overlapping(&mut self, names: &[&str], overlap: Overlap) -> Result<()> {
        Ok(self.layer.write().activate_overlapping(names, overlap)?)
    }

    /// Makes every output that of the base until [`enable`](Self::enable); the active adapters stay the active ones.
    ///
    /// # Errors
    ///
    /// While merged.
    pub fn disable(&mut self) -> Result<()> {
        Ok(self.layer.write().disable()?)
    }

    /// Ends what [`disable`](Self::disable) began.
    pub fn enable(&mut self) {
        self.layer.write().enable();
    }

    /// Whether active adapters are used.
    pub fn is_enabled(&self) -> bool {
        self.layer.read().is_enabled()
    }

    /// Names of all adapters, in the order in which they were added.
    pub fn adapter_names(&self) -> Vec<String> {
        let layer = self.layer.read();
        layer
            .adapters()
            .map(|adapter| adapter.name().to_owned())
            .collect()
    }

    /// Names of the active adapters, in their order.
    pub fn active_names(&self) -> Vec<String> {
        self.layer.read().active_names().map(str::to_owned).collect()
    }

    /// The adapter of a name, to read it.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn adapter(&self, name: &str) -> Result<impl Deref<Target = TokenAdapter<Candle>> + use<'_>> {
        let adapter = RwLockReadGuard::try_map_or_err(self.layer.read(), |layer| layer.adapter(name));
        adapter.map_err(|(_, error)| error.into())
    }

    /// The adapter of a name, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn adapter_mut(&mut self, name: &str) -> Result<AdapterMut<'_>> {
        let adapter = RwLockReadGuard::try_map_or_err(self.layer.read(), |layer| layer.adapter(name));
        adapter.map(AdapterMut::new).map_err(|(_, error)| error.into())
    }

    /// The one active adapter, to step or rewrite its rows.
    ///
    /// # Errors
    ///
    /// If not exactly one adapter is active.
    pub fn active_adapter_mut(&mut self) -> Result<AdapterMut<'_>> {
        let adapter = RwLockReadGuard::try_map_or_err(self.layer.read(), CoreLayer::active_adapter);
        adapter.map(AdapterMut::new).map_err(|(_, error)| error.into())
    }

    /// Writes the rows of the active adapters into the table in place, rounded to its element type; the old rows are kept
    /// for [`unmerge`](Self::unmerge). From then on this layer and its heads use the table alone.
    ///
    /// # Errors
    ///
    /// If they are merged already or no adapter is active, while disabled, or if candle fails.
    pub fn merge(&mut self) -> Result<()> {
        self.layer.write().merge()
    }

    /// As [`merge`](Self::merge), after a check of the rows that are written.
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge), and by the check.
    pub fn merge_checked(&mut self, check: MergeCheck) -> Result<()> {
        self.layer.write().merge_checked(check)
    }

    /// Writes the rows of these adapters into the table in place, active or not; see [`CoreLayer::merge_adapters`].
    ///
    /// # Errors
    ///
    /// Those of [`CoreLayer::merge_adapters`]. The table is unchanged then.
    pub fn merge_adapters(&mut self, names: &[&str], overlap: &Overlap, check: MergeCheck) -> Result<()> {
        self.layer.write().merge_adapters(names, overlap, check)
    }

    /// Restores the exact rows that the latest merge overwrote.
    ///
    /// # Errors
    ///
    /// If nothing is merged, or candle fails.
    pub fn unmerge(&mut self) -> Result<()> {
        self.layer.write().unmerge()
    }

    /// Whether the table holds rows of an adapter.
    pub fn is_merged(&self) -> bool {
        self.layer.read().is_merged()
    }

    /// Names of the adapters of each merge that was not undone, the latest last.
    pub fn merges(&self) -> Vec<Vec<String>> {
        let layer = self.layer.read();
        let names = layer.merges().map(|merge| merge.map(str::to_owned).collect());
        names.collect()
    }
}

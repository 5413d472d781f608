//! Rows written into the table, and taken out again.

use std::sync::Arc;

use super::TrainableTokens;
use crate::{Backend, EmbeddingSource, Error, Overlap, TokenId, TokenRows, WriteRows};

/// What is checked before rows are written into the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeCheck {
    /// Nothing.
    #[default]
    Unchecked,
    /// Every value that is written is finite in the table's element type. Other rows of the table may hold what they will.
    Finite,
}

impl<B: Backend> TrainableTokens<B> {
    /// Whether the table holds rows of an adapter.
    pub fn is_merged(&self) -> bool {
        !self.merges.is_empty()
    }

    /// Names of the adapters of each merge that was not undone, the latest last.
    pub fn merges(&self) -> impl DoubleEndedIterator<Item = impl Iterator<Item = &str>> {
        self.merges.iter().map(|names| names.iter().map(|name| &**name))
    }
}

impl<B: Backend<Source: WriteRows>> TrainableTokens<B> {
    /// Writes the rows of the active adapters into the table, rounded to its element type (PEFT's `merge`); the old rows
    /// are kept.
    ///
    /// # Errors
    ///
    /// Those of [`merge_adapters`](Self::merge_adapters).
    pub fn merge(&mut self) -> Result<(), B::Error> {
        self.merge_checked(MergeCheck::Unchecked)
    }

    /// As [`merge`](Self::merge), after a check of the rows that are written (PEFT's `safe_merge`, which checks the whole
    /// table instead).
    ///
    /// # Errors
    ///
    /// Those of [`merge`](Self::merge); [`Error::NonFinite`] by the check.
    pub fn merge_checked(&mut self, check: MergeCheck) -> Result<(), B::Error> {
        let active = self.active.clone();
        let names: Vec<_> = active.iter().map(|name| &**name).collect();
        self.merge_adapters(&names, &self.overlap.clone(), check)
    }

    /// Writes the rows of these adapters into the table, active or not, as one entry of the undo journal. `overlap` is
    /// what counts for tokens that several of them train, or that rows already merged are for: only with
    /// [`Overlap::LastWins`] may a merge overwrite rows of an earlier one. Active adapters that are not merged keep their
    /// places above the table.
    ///
    /// # Errors
    ///
    /// [`Error::NotOneActive`] without any adapter; [`Error::AlreadyMerged`], [`Error::Disabled`],
    /// [`Error::UnknownAdapter`], [`Error::AdapterName`] for a name given twice, [`Error::Overlap`],
    /// [`Error::NonFinite`]; [`Error::Shape`] and [`Error::Hyperparameter`] for weights; the table's errors. The table is
    /// unchanged then.
    pub fn merge_adapters(
        &mut self,
        names: &[&str],
        overlap: &Overlap,
        check: MergeCheck,
    ) -> Result<(), B::Error> {
        if !self.enabled {
            return Err(Error::Disabled.into());
        }
        if names.is_empty() {
            return Err(Error::NotOneActive { active: Vec::new() }.into());
        }
        let places = self.places(names)?;
        for at in &places {
            self.adapters[*at].expect_unmerged()?;
        }
        if *overlap != Overlap::LastWins {
            let active = |name: &str| self.active_names().any(|active| active == name);
            self.expect_apart(&places, |at| {
                let other = &self.adapters[at];
                !places.contains(&at) && (other.is_merged() || active(other.name()))
            })?;
        }
        let (ids, rows) = self.rows_to_merge(&places, overlap)?;
        if check == MergeCheck::Finite {
            self.expect_finite(names, &ids, &rows)?;
        }
        let mark = |layer: &mut Self, merged| {
            for at in &places {
                layer.adapters[*at].set_merged(merged);
            }
        };
        mark(self, true);
        let written = self
            .effective_of(&self.active, &self.overlap)
            .map_err(B::Error::from)
            .and_then(|effective| {
                self.journal.apply(&mut self.source, &ids, &rows)?;
                Ok(effective)
            });
        match written {
            Ok(effective) => self.effective = effective,
            Err(error) => {
                mark(self, false);
                return Err(error);
            }
        }
        let names = places
            .iter()
            .map(|at| Arc::clone(self.adapters[*at].shared_name()));
        self.merges.push(names.collect());
        Ok(())
    }

    /// Restores the exact rows that the latest merge overwrote.
    ///
    /// # Errors
    ///
    /// [`Error::NotMerged`]; the table's errors.
    pub fn unmerge(&mut self) -> Result<(), B::Error> {
        let names = self.merges.last().ok_or(Error::NotMerged)?;
        let places = names.iter().map(|name| self.place(name));
        let places = places.collect::<Result<Vec<_>, _>>()?;
        self.journal.undo(&mut self.source)?;
        for at in places {
            self.adapters[at].set_merged(false);
        }
        self.merges.pop();
        // A part of what `activate` accepted before, so this cannot fail.
        self.effective = self.effective_of(&self.active, &self.overlap)?;
        Ok(())
    }

    /// The tokens of these adapters together and their rows.
    fn rows_to_merge(
        &self,
        places: &[usize],
        overlap: &Overlap,
    ) -> Result<(Vec<TokenId>, TokenRows), B::Error> {
        if let [at] = *places {
            overlap.expect_weights(1)?;
            let adapter = &self.adapters[at];
            return Ok((adapter.tokens().ids().to_vec(), adapter.rows()?));
        }
        let set = self.named_set(places, overlap)?;
        let parts = places.iter().map(|at| self.adapters[*at].rows());
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let rows = set.mix.apply(&parts.iter().collect::<Vec<_>>())?;
        Ok((set.tokens.ids().to_vec(), rows))
    }

    fn expect_finite(&self, names: &[&str], ids: &[TokenId], rows: &TokenRows) -> crate::Result<()> {
        match rows.to_dtype(self.source.dtype()).first_non_finite() {
            None => Ok(()),
            Some((row, column)) => Err(Error::NonFinite {
                adapters: names.iter().map(|name| (*name).to_owned()).collect(),
                token: ids[row],
                column,
            }),
        }
    }
}

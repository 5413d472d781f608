//! A layer taken apart, and put together again.

use std::sync::Arc;

use super::{Effective, TrainableTokens};
use crate::active::ActiveSet;
use crate::adapter::TokenAdapter;
use crate::{Backend, EmbeddingSource, Error, LayerOptions, Overlap, TokenId, TokenRows, UndoJournal};

/// All that a layer consists of: for frameworks whose modules must hold every tensor themselves, in places of their own.
///
/// Where handles on tensors are cheap, a layer can be made of its parts for every use: nothing here costs in proportion to
/// the table.
pub struct LayerParts<B: Backend> {
    /// The table.
    pub source: B::Source,
    /// Padding, scale and the other ways in which the table is used.
    pub options: LayerOptions,
    /// The adapters, in the order in which they were added.
    pub adapters: Vec<TokenAdapter<B>>,
    /// Names of the active adapters, in their order.
    pub active: Vec<Arc<str>>,
    /// What counts for tokens that several active adapters train.
    pub overlap: Overlap,
    /// Whether active adapters are used.
    pub enabled: bool,
    /// The merges that were not undone, the latest last.
    pub merges: Vec<MergeParts>,
    /// What an earlier layer of the same parts knew, if there was one.
    pub known: KnownActive,
}

/// One merge that was not undone.
#[derive(Clone, Debug)]
pub struct MergeParts {
    /// Names of the adapters whose rows were written.
    pub adapters: Vec<Arc<str>>,
    /// The tokens whose rows were overwritten.
    pub tokens: Vec<TokenId>,
    /// The rows that stood there, in the table's element type.
    pub overwritten: TokenRows,
}

/// The tokens of several active adapters together, which are worked out once and kept. They are worked out anew where
/// they do not fit.
#[derive(Clone, Debug, Default)]
pub struct KnownActive(Option<Arc<ActiveSet>>);

impl KnownActive {
    /// The set, if it was made for the same token sets in the same order and the same choice.
    pub(super) fn get(&self, fingerprints: &[u64], overlap: &Overlap) -> Option<&Arc<ActiveSet>> {
        let known = self.0.as_ref()?;
        known.is_of(fingerprints, overlap).then_some(known)
    }
}

impl<B: Backend> TrainableTokens<B> {
    /// Takes the layer apart.
    pub fn into_parts(self) -> LayerParts<B> {
        let known = self.known_active();
        let merges = self.merges.into_iter().zip(self.journal.into_entries());
        let merges = merges.map(|(adapters, (tokens, overwritten))| MergeParts {
            adapters,
            tokens,
            overwritten,
        });
        LayerParts {
            source: self.source,
            options: self.options,
            adapters: self.adapters,
            active: self.active,
            overlap: self.overlap,
            enabled: self.enabled,
            merges: merges.collect(),
            known,
        }
    }

    /// Puts a layer together; nothing is read or written but shapes.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for tokens, rows or overwritten rows that do not fit the table; [`Error::AdapterName`] for a name
    /// given twice; [`Error::UnknownAdapter`] for an active or merged one that is not there; [`Error::AlreadyMerged`] for one
    /// that is merged twice, or merged while all are disabled; [`Error::TokenOutOfRange`] for an overwritten row;
    /// [`Error::Overlap`] and those of weights, as for [`activate_overlapping`](Self::activate_overlapping).
    pub fn from_parts(parts: LayerParts<B>) -> Result<Self, B::Error> {
        let mut layer = Self::frozen(parts.source)?;
        layer.options = parts.options;
        layer.known = parts.known;
        for adapter in parts.adapters {
            layer.push_adapter(adapter)?;
        }
        for adapter in &mut layer.adapters {
            adapter.set_merged(false);
        }
        let mut entries = Vec::with_capacity(parts.merges.len());
        for merge in parts.merges {
            layer.source.check_ids(&merge.tokens)?;
            let (rows, dim) = (merge.tokens.len(), layer.source.embedding_dim());
            merge.overwritten.expect_shape("overwritten rows", rows, dim)?;
            for name in &merge.adapters {
                let at = layer.place(name)?;
                layer.adapters[at].expect_unmerged()?;
                layer.adapters[at].set_merged(true);
            }
            layer.merges.push(merge.adapters);
            entries.push((merge.tokens, merge.overwritten));
        }
        layer.journal = UndoJournal::from_entries(entries);
        if !parts.enabled {
            layer.disable()?;
        }
        layer.places(&parts.active.iter().map(|name| &**name).collect::<Vec<_>>())?;
        layer.effective = layer.effective_of(&parts.active, &parts.overlap)?;
        layer.active = parts.active;
        layer.overlap = parts.overlap;
        Ok(layer)
    }

    /// What the layer worked out about its active adapters, for [`LayerParts::known`].
    pub fn known_active(&self) -> KnownActive {
        KnownActive(match &self.effective {
            Effective::Several(_, set) => Some(Arc::clone(set)),
            _ => None,
        })
    }

    /// Adds an adapter with rows of its own.
    pub(super) fn push_adapter(&mut self, adapter: TokenAdapter<B>) -> Result<(), Error> {
        self.expect_vocabulary(adapter.tokens())?;
        adapter.expect_rows(self.source.embedding_dim())?;
        if self.adapters().any(|other| other.name() == adapter.name()) {
            let name = adapter.name().to_owned();
            let must = "another than those of the layer's other adapters";
            return Err(Error::AdapterName { name, must });
        }
        self.adapters.push(adapter);
        Ok(())
    }
}

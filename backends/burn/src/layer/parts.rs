//! The module as core's layer: made of handles on its parameters for every use.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Param, ParamId};
use burn::nn::Embedding;
use burn::tensor::Tensor;
use trainable_tokens_core::{
    EmbeddingSource, KnownActive, LayerOptions, LayerParts, MergeParts, Overlap, TokenId, TokenRows,
    TrainableTokens as CoreLayer, WriteRows,
};

use super::{MergedRows, TrainableTokens};
use crate::{Burn, BurnTable, Result, TokenAdapter};

/// What of the module is no tensor.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) options: LayerOptions,
    pub(super) active: Vec<Arc<str>>,
    pub(super) overlap: Overlap,
    pub(super) disabled: bool,
    /// Shared by clones; whoever does not find in it what fits replaces it.
    known: Arc<Mutex<KnownActive>>,
}

impl TrainableTokens {
    /// A module over a frozen table, of what core made of it.
    pub(super) fn from_core(base: Embedding, layer: CoreLayer<Burn>) -> Result<Self> {
        let mut module = Self {
            base,
            adapters: Vec::new(),
            merges: Vec::new(),
            state: State::default(),
        };
        module.adopt(layer.into_parts())?;
        Ok(module)
    }

    /// The frozen table; a handle, not a copy.
    pub(crate) fn table(&self) -> Result<BurnTable> {
        BurnTable::new(self.base.weight.val())
    }

    /// Core's layer over the same tensors, to be used and dropped.
    pub(crate) fn core(&self) -> Result<CoreLayer<Burn>> {
        let table = self.table()?;
        let (dtype, dim) = (table.dtype(), table.embedding_dim());
        let merges = self.merges.iter().map(|merge| merge.outline(dtype, dim));
        self.assemble(table, merges.collect())
    }

    /// Lets `change` change core's layer over the same tensors, and takes over what became of it. Nothing changes if that
    /// fails.
    pub(crate) fn change<R>(&mut self, change: impl FnOnce(&mut CoreLayer<Burn>) -> Result<R>) -> Result<R> {
        let table = self.table()?.deferring_writes();
        let (dtype, dim) = (table.dtype(), table.embedding_dim());
        let merges = self.merges.iter().map(|merge| merge.outline(dtype, dim));
        let mut layer = self.assemble(table, merges.collect())?;
        let result = change(&mut layer)?;
        self.adopt(layer.into_parts())?;
        Ok(result)
    }

    /// As [`change`](Self::change), for undoing the latest merge.
    pub(super) fn change_merged(
        &mut self,
        change: impl FnOnce(&mut CoreLayer<Burn>) -> Result<()>,
    ) -> Result<()> {
        let table = self.table()?.deferring_writes();
        let merges = self.merges.iter().map(|merge| merge.read(table.vocab_size()));
        let merges = merges.collect::<Result<_>>()?;
        let mut layer = self.assemble(table, merges)?;
        change(&mut layer)?;
        self.adopt(layer.into_parts())
    }

    fn assemble(&self, source: BurnTable, merges: Vec<MergeParts>) -> Result<CoreLayer<Burn>> {
        let vocab_size = source.vocab_size();
        let adapters = self.adapters.iter().map(|adapter| adapter.to_core(vocab_size));
        let State {
            options,
            active,
            overlap,
            disabled,
            known,
        } = &self.state;
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = CoreLayer::from_parts(LayerParts {
            source,
            options: *options,
            adapters: adapters.collect::<Result<_>>()?,
            active: active.clone(),
            overlap: overlap.clone(),
            enabled: !disabled,
            merges,
            known: known.clone(),
        })?;
        *known = layer.known_active();
        Ok(layer)
    }

    fn adopt(&mut self, parts: LayerParts<Burn>) -> Result<()> {
        let writes = parts.source.into_writes();
        let known = |name: &str| self.adapters.iter().find(|adapter| adapter.name() == name);
        let adapters = parts.adapters.into_iter().map(|adapter| {
            let known = known(adapter.name());
            TokenAdapter::from_core(adapter, known)
        });
        let adapters = adapters.collect::<Result<Vec<_>>>()?;
        let device = self.base.weight.val().device();
        let new = parts.merges.iter().skip(self.merges.len());
        let new = new.map(|merge| MergedRows::from_core(merge, &device));
        let new = new.collect::<Result<Vec<_>>>()?;
        for (ids, rows) in &writes {
            self.overwrite(ids, rows)?;
        }
        self.adapters = adapters;
        self.merges.truncate(parts.merges.len());
        self.merges.extend(new);
        self.state = State {
            options: parts.options,
            active: parts.active,
            overlap: parts.overlap,
            disabled: !parts.enabled,
            known: Arc::clone(&self.state.known),
        };
        Ok(())
    }

    /// Writes rows of the table, in place if no other handle is left.
    fn overwrite(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        let device = self.base.weight.val().device();
        let nothing = Param::initialized(ParamId::new(), Tensor::zeros([1, 1], &device));
        let (id, tensor, mapper) = std::mem::replace(&mut self.base.weight, nothing).consume();
        let mut table = BurnTable::new(tensor)?;
        let written = table.write_rows(ids, rows);
        self.base.weight = Param::from_mapped_value(id, table.into_tensor(), mapper);
        written
    }
}

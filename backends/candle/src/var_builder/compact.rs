//! A table of only the rows that a data set uses.

mod adapters;
mod graft;
mod served;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use trainable_tokens_core::{
    EmbeddingSource, Error as CoreError, RowMix, TokenAdapter, TokenId, TokenSet,
    TrainableTokens as CoreLayer,
};

use self::graft::Graft;
use self::served::Served;
use super::wrapped::Wrapped;
use crate::convert::{core_dtype, to_tensor};
use crate::ids::{expect_examples, read_ids};
use crate::{Candle, CandleDelta, CandleTable, Error, Result, TrainableTokens};

/// A table `[k + u, D]` of the `k` trained rows of all its adapters and the frozen rows of the `u` ids that a data set
/// uses, in the place of the whole table, so that a model whose code cannot be changed trains without `V x D` on the
/// device.
///
/// The model is built from [`var_builder`](Self::var_builder), receives the compact table as its embedding weight,
/// and is fed ids from [`remap`](Self::remap). Candle's own dense gradient of the table then has `k + u` rows, of
/// which the first `k` reach the adapters' rows. Logits equal those of the whole table, bit for bit.
///
/// Each trained row has a place of its own. Which adapters are active only decides which places ids are sent to, and so
/// [`remap_mixed`](Self::remap_mixed) can choose for each example. The mean of several rows has no place:
/// [`Overlap::WeightedMean`](trainable_tokens_core::Overlap::WeightedMean) is refused. The model holds the table from the
/// beginning, so that the adapters are those of [`with_adapters`](Self::with_adapters) for good.
///
/// It serves models that are differentiable and whose head is not tied to the embedding (a tied head would have
/// `k + u` columns). A table of half precision sums its gradient in half precision, as candle does.
///
/// The model holds the compact table, not the variables: [`step`](Self::step), [`set_rows`](Self::set_rows) and
/// [`remap`](Self::remap) copy the variables' rows into it. After a step of one of candle's optimizers or of
/// [`adapter_mut`](Self::adapter_mut), call `remap` for the next batch, or [`refresh`](Self::refresh).
#[derive(Debug)]
pub struct CompactTable {
    /// Keeps the adapters and which of them are active. Its own table has no rows and is never used.
    layer: TrainableTokens,
    table: Tensor,
    /// The place of each id's frozen row.
    place_of: HashMap<u32, u32>,
    vocab_size: usize,
}

impl CompactTable {
    /// Takes the rows of `token_ids`, in that order, as an active adapter `default`; see
    /// [`with_adapters`](Self::with_adapters).
    ///
    /// # Errors
    ///
    /// Those of [`with_adapters`](Self::with_adapters).
    pub fn new<S: EmbeddingSource>(
        source: &S,
        token_ids: &[u32],
        used_ids: impl IntoIterator<Item = u32>,
        dtype: candle_core::DType,
        device: &Device,
    ) -> Result<Self> {
        let mut table = Self::with_adapters(source, &[("default", token_ids)], used_ids, dtype, device)?;
        table.activate(&["default"])?;
        Ok(table)
    }

    /// Takes the rows of the token ids of each adapter, of which none is active yet, then the frozen rows of all of these
    /// ids and of `used_ids` (which may repeat, and may hold trainable ids) from a table of any kind, such as one in a
    /// memory-mapped file. Rows keep their bits if `dtype` is the table's own.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice to an adapter, an adapter name given twice or that cannot be one, a `dtype`
    /// that is not a float, and when the source or candle fails.
    pub fn with_adapters<S: EmbeddingSource>(
        source: &S,
        adapters: &[(&str, &[u32])],
        used_ids: impl IntoIterator<Item = u32>,
        dtype: candle_core::DType,
        device: &Device,
    ) -> Result<Self> {
        let dtype = core_dtype("compact table", dtype)?;
        let (vocab_size, dim) = (source.vocab_size(), source.embedding_dim());
        let mut layer = CoreLayer::frozen(CandleTable::without_rows(vocab_size, dim, dtype, device)?)?;
        let mut ids = Vec::new();
        for (name, token_ids) in adapters {
            let tokens = TokenSet::new(token_ids.iter().copied(), vocab_size)?;
            let rows = source.read_rows(tokens.ids()).map_err(Error::source)?;
            ids.extend_from_slice(tokens.ids());
            layer.add_adapter_with_rows(name, tokens, &rows.to_dtype(dtype.default_row_dtype()))?;
        }
        let num_trained = ids.len();
        let mut place_of = HashMap::new();
        let mut frozen = Vec::new();
        for id in ids.into_iter().chain(used_ids.into_iter().map(TokenId)) {
            if let Entry::Vacant(entry) = place_of.entry(id.0) {
                let place = u32::try_from(num_trained + frozen.len());
                entry.insert(place.map_err(|_| CoreError::VocabularyTooLarge { vocab_size })?);
                frozen.push(id);
            }
        }
        let frozen = source.read_rows(&frozen).map_err(Error::source)?;
        let frozen = to_tensor(&frozen.to_dtype(dtype), device)?;
        let deltas: Vec<_> = layer.adapters().map(TokenAdapter::delta).collect();
        let part_rows = layer.adapters().map(|adapter| adapter.tokens().len()).collect();
        let trained = CandleDelta::combine(&deltas, &RowMix::stack(part_rows)?)?;
        let trained = trained.tensor();
        let whole = if num_trained == 0 {
            frozen
        } else {
            Tensor::cat(&[&trained.detach().to_dtype(frozen.dtype())?, &frozen], 0)?
        };
        let table = trained.apply_op1(Graft::new(whole))?;
        Ok(Self {
            layer: TrainableTokens::from_layer(layer),
            table,
            place_of,
            vocab_size,
        })
    }

    /// A builder that serves this table for the tensor `name`, of which models ask the whole shape `[V, D]`, and
    /// everything else from `inner`. Names are relative to the prefix of `inner`.
    pub fn var_builder<'a>(&self, inner: VarBuilder<'a>, name: &str) -> VarBuilder<'a> {
        let (dtype, device) = (inner.dtype(), inner.device().clone());
        let served = Served::new(Wrapped(inner), name, self.table.clone(), self.vocab_size);
        VarBuilder::new_with_args(Box::new(served) as Box<dyn SimpleBackend + 'a>, dtype, &device)
    }

    /// The places in this table of `input_ids`, of any integer type and shape, for the active adapters: what to feed to
    /// the model. It also brings the table up to date.
    ///
    /// # Errors
    ///
    /// [`Error::NotInDataSet`] for an id that the table was not built for; when candle fails.
    pub fn remap(&self, input_ids: &Tensor) -> Result<Tensor> {
        let ids = read_ids(input_ids, self.vocab_size)?;
        let places = self.remap_slice(&ids)?;
        self.refresh()?;
        Ok(Tensor::from_vec(places, input_ids.shape(), self.table.device())?)
    }

    /// As [`remap`](Self::remap), for a mixed batch `input_ids` `[B, ..]`: each of its `B` examples sees the rows of the
    /// adapter of its name, active or not, or the base's alone.
    ///
    /// # Errors
    ///
    /// As [`remap`](Self::remap); if there are not `B` names, for an unknown one, and while disabled.
    pub fn remap_mixed(&self, input_ids: &Tensor, adapters: &[Option<&str>]) -> Result<Tensor> {
        expect_examples("input_ids of a mixed batch", input_ids.dims(), adapters)?;
        let ids = read_ids(input_ids, self.vocab_size)?;
        let layer = self.layer.layer();
        let mut places = Vec::with_capacity(ids.len());
        for (rows, adapter) in layer.mixed_parts(ids.len(), adapters)? {
            let seen = Seen::among(&layer, adapter.map(TokenAdapter::name));
            places.extend(self.places(&ids[rows], &seen)?);
        }
        self.refresh()?;
        Ok(Tensor::from_vec(places, input_ids.shape(), self.table.device())?)
    }

    /// The places in this table of ids on the host, for the active adapters.
    ///
    /// # Errors
    ///
    /// [`Error::NotInDataSet`] for an id that the table was not built for.
    pub fn remap_slice(&self, input_ids: &[u32]) -> Result<Vec<u32>> {
        let layer = self.layer.layer();
        let seen = if layer.is_enabled() {
            Seen::among(&layer, layer.active_names())
        } else {
            Vec::new()
        };
        self.places(input_ids, &seen)
    }

    fn places(&self, ids: &[u32], seen: &[Seen<'_>]) -> Result<Vec<u32>> {
        let place = |id: &u32| {
            // The last of several adapters wins.
            let trained = seen.iter().rev().find_map(|seen| seen.place(*id));
            let place = trained.or_else(|| self.place_of.get(id).copied());
            place.ok_or(Error::NotInDataSet { id: *id })
        };
        ids.iter().map(place).collect()
    }

    /// Copies the variables' rows into the table that the model holds, rounded to its element type.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn refresh(&self) -> Result<()> {
        let mut start = 0;
        for adapter in self.layer.layer().adapters() {
            let rows = adapter.delta().tensor().detach();
            if rows.elem_count() > 0 {
                let rows_of_table = rows.to_dtype(self.table.dtype())?;
                self.table.slice_set(&rows_of_table, 0, start)?;
            }
            start += adapter.tokens().len();
        }
        Ok(())
    }

    /// The compact table, `[k + u, D]`, a node in the graph of the adapters' variables.
    pub fn tensor(&self) -> &Tensor {
        &self.table
    }
}

/// An adapter whose rows a batch sees, and the place of its first row.
struct Seen<'a> {
    tokens: &'a TokenSet,
    start: usize,
}

impl<'a> Seen<'a> {
    /// The adapters of these names, in the names' order.
    fn among<'n>(layer: &'a CoreLayer<Candle>, names: impl IntoIterator<Item = &'n str>) -> Vec<Self> {
        let mut start = 0;
        let mut all = HashMap::new();
        for adapter in layer.adapters() {
            let tokens = adapter.tokens();
            all.insert(adapter.name(), Self { tokens, start });
            start += tokens.len();
        }
        let seen = names.into_iter().filter_map(|name| all.remove(name));
        seen.collect()
    }

    fn place(&self, id: u32) -> Option<u32> {
        let slot = self.tokens.slot(TokenId(id))?;
        u32::try_from(self.start + slot.0).ok()
    }
}

//! A table of only the rows that a data set uses.

mod graft;
mod served;

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use trainable_tokens_core::{
    Backend, DeltaStore, EmbeddingSource, Error as CoreError, OptimizerHook, RowOptimizer, StepReport,
    TokenId, TokenRows, TokenSet, step_delta,
};

use self::graft::Graft;
use self::served::Served;
use super::wrapped::Wrapped;
use crate::convert::{core_dtype, to_tensor};
use crate::ids::read_ids;
use crate::{Candle, CandleDelta, Error, Result};

/// A table `[k + u, D]` of the `k` trainable rows and the `u` frozen rows that a data set uses, in the place of the
/// whole table, so that a model whose code cannot be changed trains without `V x D` on the device.
///
/// The model is built from [`var_builder`](Self::var_builder), receives the compact table as its embedding weight,
/// and is fed ids from [`remap`](Self::remap). Candle's own dense gradient of the table then has `k + u` rows, of
/// which the first `k` reach [`var`](Self::var). Logits equal those of the whole table, bit for bit.
///
/// It serves models that are differentiable and whose head is not tied to the embedding (a tied head would have
/// `k + u` columns). A table of half precision sums its gradient in half precision, as candle does.
///
/// The model holds the compact table, not the variable: [`step`](Self::step), [`set_rows`](Self::set_rows) and
/// [`remap`](Self::remap) copy the variable's rows into it. After a step of one of candle's optimizers on the variable,
/// call `remap` for the next batch, or [`refresh`](Self::refresh).
#[derive(Debug)]
pub struct CompactTable {
    delta: CandleDelta,
    table: Tensor,
    tokens: TokenSet,
    place_of: HashMap<u32, u32>,
}

impl CompactTable {
    /// Takes the rows of `token_ids`, in that order, then those of `used_ids` (which may repeat, and may hold trainable
    /// ids) from a table of any kind, such as one in a memory-mapped file. Rows keep their bits if `dtype` is the
    /// table's own.
    ///
    /// # Errors
    ///
    /// For an id out of range or a trainable id given twice, for a `dtype` that is not a float, and when the source
    /// or candle fails.
    pub fn new<S: EmbeddingSource>(
        source: &S,
        token_ids: &[u32],
        used_ids: impl IntoIterator<Item = u32>,
        dtype: candle_core::DType,
        device: &Device,
    ) -> Result<Self> {
        let tokens = TokenSet::new(token_ids.iter().copied(), source.vocab_size())?;
        let mut ids = tokens.to_vec();
        let mut place_of: HashMap<u32, u32> = ids.iter().copied().zip(0..).collect();
        let mut next = (tokens.len()..).map(u32::try_from);
        for id in used_ids {
            if let std::collections::hash_map::Entry::Vacant(entry) = place_of.entry(id) {
                ids.push(id);
                let Some(Ok(place)) = next.next() else {
                    let vocab_size = source.vocab_size();
                    return Err(CoreError::VocabularyTooLarge { vocab_size }.into());
                };
                entry.insert(place);
            }
        }
        let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
        let dtype = core_dtype("compact table", dtype)?;
        let rows = source.read_rows(&ids).map_err(Error::source)?;
        let trained = source.read_rows(tokens.ids()).map_err(Error::source)?;
        let delta = CandleDelta::new(&trained.to_dtype(dtype.default_row_dtype()), device)?;
        let rows = to_tensor(&rows.to_dtype(dtype), device)?;
        let table = delta.tensor().apply_op1(Graft::new(rows))?;
        Ok(Self {
            delta,
            table,
            tokens,
            place_of,
        })
    }

    /// A builder that serves this table for the tensor `name`, of which models ask the whole shape `[V, D]`, and
    /// everything else from `inner`. Names are relative to the prefix of `inner`.
    pub fn var_builder<'a>(&self, inner: VarBuilder<'a>, name: &str) -> VarBuilder<'a> {
        let (dtype, device) = (inner.dtype(), inner.device().clone());
        let vocab_size = self.tokens.vocab_size();
        let served = Served::new(Wrapped(inner), name, self.table.clone(), vocab_size);
        VarBuilder::new_with_args(Box::new(served) as Box<dyn SimpleBackend + 'a>, dtype, &device)
    }

    /// The places in this table of `input_ids`, of any integer type and shape: what to feed to the model. It also
    /// brings the table up to date.
    ///
    /// # Errors
    ///
    /// [`Error::NotInDataSet`] for an id that the table was not built for; when candle fails.
    pub fn remap(&self, input_ids: &Tensor) -> Result<Tensor> {
        let ids = read_ids(input_ids, self.tokens.vocab_size())?;
        let places = self.remap_slice(&ids)?;
        self.refresh()?;
        Ok(Tensor::from_vec(places, input_ids.shape(), self.table.device())?)
    }

    /// The places in this table of ids on the host.
    ///
    /// # Errors
    ///
    /// [`Error::NotInDataSet`] for an id that the table was not built for.
    pub fn remap_slice(&self, input_ids: &[u32]) -> Result<Vec<u32>> {
        let place = |id: &u32| {
            self.place_of
                .get(id)
                .copied()
                .ok_or(Error::NotInDataSet { id: *id })
        };
        input_ids.iter().map(place).collect()
    }

    /// Copies the variable's rows into the table that the model holds, rounded to its element type.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn refresh(&self) -> Result<()> {
        let rows = self.delta.tensor().detach();
        if rows.elem_count() > 0 {
            self.table.slice_set(&rows.to_dtype(self.table.dtype())?, 0, 0)?;
        }
        Ok(())
    }

    /// The compact table, `[k + u, D]`, a node in the graph of [`var`](Self::var).
    pub fn tensor(&self) -> &Tensor {
        &self.table
    }

    /// The trainable tokens, in slot order.
    pub fn tokens(&self) -> &TokenSet {
        &self.tokens
    }

    /// The trained rows as candle's variable, `[k, D]`.
    pub fn var(&self) -> Result<&Var> {
        self.delta.var()
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.delta.read()
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.delta.write(&rows.to_dtype(self.delta.dtype()))?;
        self.refresh()
    }

    /// One optimizer step on the rows, with hooks before and after.
    ///
    /// # Errors
    ///
    /// [`CoreError::NoGradient`] if the backward pass did not reach the rows; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let gradient = match Candle::gradient(gradients, &self.delta)? {
            Some(gradient) => gradient,
            None if self.tokens.is_empty() => self.delta.read()?,
            None => return Err(CoreError::NoGradient.into()),
        };
        let report = step_delta(optimizer, hooks, &self.tokens, &mut self.delta, gradient)?;
        self.refresh()?;
        Ok(report)
    }
}

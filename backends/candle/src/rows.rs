//! The trained rows.

use candle_core::{Device, Tensor, Var};
use trainable_tokens_core::{DType, DeltaStore, RowMix, TokenRows};

use crate::convert::{Replace, core_dtype, into_tensor, to_rows, to_var};
use crate::ops::mix_rows;
use crate::{Error, Result};

/// The trained rows `[k, D]` in a candle [`Var`]: a real leaf of candle's graph. Or those of several adapters put together
/// for one lookup or head: a node of the graph over their leaves, which is never written.
///
/// Clones share the variable, so that what one writes the other reads.
#[derive(Clone, Debug)]
pub struct CandleDelta {
    rows: Rows,
    dtype: DType,
}

#[derive(Clone, Debug)]
enum Rows {
    Leaf(Var),
    Combined(Tensor),
}

impl CandleDelta {
    /// Makes a variable of `rows` on `device`, bit for bit, in their own element type.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn new(rows: &TokenRows, device: &Device) -> Result<Self> {
        let var = to_var(rows, device)?;
        let dtype = core_dtype("trained rows", var.dtype())?;
        let rows = Rows::Leaf(var);
        Ok(Self { rows, dtype })
    }

    /// The rows of several adapters, as a node of their graph.
    pub(crate) fn combine(parts: &[&Self], mix: &RowMix) -> Result<Self> {
        let dtype = mix.dtype(parts.iter().map(|part| part.dtype));
        let tensors: Vec<_> = parts.iter().map(|part| part.tensor()).collect();
        let rows = Rows::Combined(mix_rows(&tensors, mix, dtype)?);
        Ok(Self { rows, dtype })
    }

    /// The rows as a tensor of candle's graph.
    pub fn tensor(&self) -> &Tensor {
        match &self.rows {
            Rows::Leaf(var) => var,
            Rows::Combined(tensor) => tensor,
        }
    }

    /// The variable itself, for candle's own optimizers: `candle_nn::AdamW::new(vec![delta.var()?.clone()], …)`.
    ///
    /// # Errors
    ///
    /// [`Error::Combination`].
    pub fn var(&self) -> Result<&Var> {
        match &self.rows {
            Rows::Leaf(var) => Ok(var),
            Rows::Combined(_) => Err(Error::Combination),
        }
    }
}

impl DeltaStore for CandleDelta {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.tensor().dims()[0]
    }

    fn embedding_dim(&self) -> usize {
        self.tensor().dims()[1]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read(&self) -> Result<TokenRows> {
        to_rows(self.tensor())
    }

    /// A combination refuses it with [`Error::Combination`].
    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.var()?;
        self.check_write(rows)?;
        self.replace(rows.clone())
    }

    /// As [`write`](Self::write). While `change` runs nobody is kept from reading the variable.
    fn update(
        &mut self,
        change: &mut dyn FnMut(&mut TokenRows) -> trainable_tokens_core::Result<()>,
    ) -> Result<()> {
        self.var()?;
        let mut rows = self.read()?;
        change(&mut rows)?;
        self.check_write(&rows)?;
        self.replace(rows)
    }
}

impl CandleDelta {
    /// Replaces the rows by others of the same shape and type.
    fn replace(&mut self, rows: TokenRows) -> Result<()> {
        let var = self.var()?;
        match var.device() {
            _ if var.elem_count() == 0 => {}
            Device::Cpu => var.inplace_op1(&Replace::with(rows))?,
            device => var.set(&into_tensor(rows, device)?)?,
        }
        Ok(())
    }
}

//! The trained rows.

use candle_core::{Device, Var};
use trainable_tokens_core::{DType, DeltaStore, TokenRows};

use crate::Result;
use crate::convert::{core_dtype, to_rows, to_tensor, to_var};

/// The trained rows `[k, D]` in a candle [`Var`]: a real leaf of candle's graph.
///
/// Clones share the variable, so that what one writes the other reads.
#[derive(Clone, Debug)]
pub struct CandleDelta {
    var: Var,
    dtype: DType,
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
        Ok(Self { var, dtype })
    }

    /// The variable itself, for candle's own optimizers: `candle_nn::AdamW::new(vec![delta.var().clone()], …)`.
    pub fn var(&self) -> &Var {
        &self.var
    }
}

impl DeltaStore for CandleDelta {
    type Error = crate::Error;

    fn num_rows(&self) -> usize {
        self.var.dims()[0]
    }

    fn embedding_dim(&self) -> usize {
        self.var.dims()[1]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read(&self) -> Result<TokenRows> {
        to_rows(self.var.as_tensor())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.check_write(rows)?;
        if self.var.elem_count() > 0 {
            self.var.set(&to_tensor(rows, self.var.device())?)?;
        }
        Ok(())
    }
}

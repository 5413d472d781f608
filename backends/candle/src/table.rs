//! The frozen table.

use candle_core::{Device, Tensor};
use trainable_tokens_core::{DType, EmbeddingSource, TokenId, TokenRows, WriteRows};

use crate::convert::{candle_dtype, core_dtype, to_rows, to_tensor};
use crate::{Error, Result};

/// A frozen embedding table `[V, D]` in a candle tensor, on any device.
///
/// The tensor is detached: it is in no graph, gets no gradient and can enter no optimizer through this table. Its
/// storage is shared, not copied. [`WriteRows::write_rows`], and with it a layer's merge, writes **in place**:
/// every clone and view of the tensor, in this layer or elsewhere in the model, sees the new rows.
#[derive(Clone, Debug)]
pub struct CandleTable {
    tensor: Tensor,
    dtype: DType,
}

impl CandleTable {
    /// Wraps `tensor`, of shape `[V, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] unless it has two dimensions, [`Error::ElementType`] unless it is F64, F32, F16 or BF16,
    /// [`Error::NotContiguous`] for a transposed or otherwise strided view, which could not be written in place.
    #[expect(clippy::needless_pass_by_value, reason = "the table takes the tensor's place")]
    pub fn new(tensor: Tensor) -> Result<Self> {
        let what = "embedding table";
        if tensor.rank() != 2 {
            let (expected, got) = ("[vocab_size, embedding_dim]", tensor.dims().to_vec());
            return Err(Error::Rank { what, expected, got });
        }
        let dtype = core_dtype(what, tensor.dtype())?;
        if !tensor.is_contiguous() {
            return Err(Error::NotContiguous { what });
        }
        Ok(Self {
            tensor: tensor.detach(),
            dtype,
        })
    }

    /// What stands for a table of these sizes where none of its rows is ever used: one row for all, of zeros.
    pub(crate) fn without_rows(vocab_size: usize, dim: usize, dtype: DType, device: &Device) -> Result<Self> {
        let tensor = Tensor::zeros((1, dim), candle_dtype(dtype), device)?;
        let tensor = tensor.broadcast_as((vocab_size, dim))?;
        Ok(Self { tensor, dtype })
    }

    /// The table as a detached tensor that shares its storage.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

impl EmbeddingSource for CandleTable {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.tensor.dims()[0]
    }

    fn embedding_dim(&self) -> usize {
        self.tensor.dims()[1]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        self.check_ids(ids)?;
        if ids.is_empty() {
            return Ok(TokenRows::zeros(self.dtype, 0, self.embedding_dim()));
        }
        let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
        let ids = Tensor::from_slice(&ids, ids.len(), self.tensor.device())?;
        to_rows(&self.tensor.index_select(&ids, 0)?)
    }
}

impl WriteRows for CandleTable {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        self.check_write(ids, rows)?;
        if ids.is_empty() || self.embedding_dim() == 0 {
            return Ok(());
        }
        let rows = to_tensor(rows, self.tensor.device())?;
        for (row, id) in ids.iter().enumerate() {
            self.tensor.slice_set(&rows.narrow(0, row, 1)?, 0, id.row())?;
        }
        Ok(())
    }
}

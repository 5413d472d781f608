//! The frozen table.

use std::collections::BTreeMap;

use burn::tensor::{IndexingUpdateOp, Tensor};
use trainable_tokens_core::{DType, EmbeddingSource, TokenId, TokenRows, WriteRows};

use crate::convert::{core_dtype, to_indices, to_rows, to_tensor};
use crate::{Error, Result};

/// A frozen embedding table `[V, D]` in a burn tensor, on any device.
///
/// The tensor is detached: it is in no graph and gets no gradient. Wrapping copies nothing.
///
/// Burn's tensors are values: clones share memory until one of them is written. [`WriteRows::write_rows`], and with it
/// a layer's merge, writes in place if no clone is left, and else into a copy of the table; clones never see the
/// new rows. [`into_tensor`](Self::into_tensor) gives the written table back.
#[derive(Clone, Debug)]
pub struct BurnTable {
    tensor: Tensor<2>,
    dtype: DType,
    /// Writes that are only noted, for whoever owns the table.
    deferred: Option<Writes>,
}

/// Rows to write, in the table's element type, and where.
pub(crate) type Writes = Vec<(Vec<TokenId>, TokenRows)>;

impl BurnTable {
    /// Wraps `tensor`, of shape `[V, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::ElementType`] unless its elements are F64, F32, F16 or BF16 (quantised tables are refused).
    pub fn new(tensor: Tensor<2>) -> Result<Self> {
        let dtype = core_dtype("embedding table", tensor.dtype())?;
        let tensor = tensor.detach();
        let deferred = None;
        Ok(Self {
            tensor,
            dtype,
            deferred,
        })
    }

    /// A handle whose writes are noted instead.
    pub(crate) fn deferring_writes(self) -> Self {
        let deferred = Some(Writes::new());
        Self { deferred, ..self }
    }

    /// Gives up the handle for the writes that it noted.
    pub(crate) fn into_writes(self) -> Writes {
        self.deferred.unwrap_or_default()
    }

    /// The table as a detached tensor.
    pub fn tensor(&self) -> &Tensor<2> {
        &self.tensor
    }

    /// Gives up the wrapper for its tensor, as it is now.
    pub fn into_tensor(self) -> Tensor<2> {
        self.tensor
    }
}

impl EmbeddingSource for BurnTable {
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
        let ids = to_indices(&ids, &self.tensor.device());
        to_rows("embedding table", self.tensor.clone().select(0, ids))
    }
}

impl WriteRows for BurnTable {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        self.check_write(ids, rows)?;
        if ids.is_empty() || self.embedding_dim() == 0 {
            return Ok(());
        }
        if let Some(writes) = &mut self.deferred {
            writes.push((ids.to_vec(), rows.clone()));
            return Ok(());
        }
        let device = self.tensor.device();
        let rows = to_tensor("rows to write", rows, &device)?;
        // Of two rows for one id the last counts; burn leaves open which of them it would keep.
        let row_of: BTreeMap<u32, u32> = ids.iter().map(|id| id.0).zip(0..).collect();
        let (ids, kept): (Vec<u32>, Vec<u32>) = row_of.into_iter().unzip();
        let rows = rows.select(0, to_indices(&kept, &device));
        // Burn writes in place only through the last handle on a tensor's memory, so this one is given up.
        let handle = std::mem::replace(&mut self.tensor, Tensor::zeros([1, 1], &device));
        self.tensor = handle.select_assign(0, to_indices(&ids, &device), rows, IndexingUpdateOp::Assign);
        Ok(())
    }
}

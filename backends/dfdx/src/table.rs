//! The frozen table.

use dfdx::shapes::{RealizeShapeTo, Shape};
use dfdx::tensor::{Cpu, Tensor};
use dfdx::tensor_ops::ReshapeTo;
use trainable_tokens_core::{
    DType, EmbeddingSource, Error as CoreError, HostTable, TokenId, TokenRows, WriteRows,
};

use crate::convert::{Matrix, at_runtime, dims, matrix, to_elements};
use crate::{DfdxDevice, DfdxElement, Error, Result};

/// A frozen embedding table `[V, D]` in a dfdx tensor.
///
/// The tensor is only ever read without a tape: it is in no graph, gets no gradient and enters no optimizer through
/// this table. Its storage is shared with the caller's clones, not copied.
///
/// # Merging
///
/// [`WriteRows::write_rows`], and with it a layer's merge, writes in place where nobody else holds the storage. dfdx's
/// tensors are copied on write: if a clone of the tensor, or a tape that went through a head, still exists, then dfdx
/// copies the whole table first and the clone keeps the old rows. On CUDA it is refused.
#[derive(Clone, Debug)]
pub struct DfdxTable<E: DfdxElement, D: DfdxDevice<E> = Cpu> {
    tensor: Matrix<E, D>,
}

impl<E: DfdxElement, D: DfdxDevice<E>> DfdxTable<E, D> {
    /// Wraps a tensor with two dimensions, at runtime or const sizes. A permuted or broadcast one is copied once,
    /// because its rows could not be written.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn new<S>(tensor: Tensor<S, E, D>) -> Result<Self>
    where
        S: Shape<Concrete = [usize; 2]> + RealizeShapeTo<(usize, usize)>,
    {
        let tensor = at_runtime(tensor)?.try_contiguous().map_err(Error::dfdx)?;
        Ok(Self { tensor })
    }

    /// Copies a table in host memory or a memory-mapped file, of any element type, to a tensor on `device`. Elements
    /// of another type are converted: bfloat16, which dfdx does not have, is exact in `f32`.
    ///
    /// # Errors
    ///
    /// When a row cannot be read, or dfdx fails.
    pub fn load<S: HostTable>(table: &S, device: &D) -> Result<Self> {
        let (vocab_size, dim) = (table.vocab_size(), table.embedding_dim());
        let mut values: Vec<E> = Vec::with_capacity(vocab_size * dim);
        for id in 0..vocab_size {
            let id = u32::try_from(id).map_err(|_| CoreError::VocabularyTooLarge { vocab_size })?;
            match table.row(TokenId(id)) {
                Some(row) => row.extend_into(&mut values),
                None => {
                    return Err(CoreError::TokenOutOfRange {
                        id: id.into(),
                        vocab_size,
                    }
                    .into());
                }
            }
        }
        let tensor = matrix(device, values, vocab_size, dim)?;
        Ok(Self { tensor })
    }

    /// The table as a tensor that shares its storage.
    pub fn tensor(&self) -> &Tensor<(usize, usize), E, D> {
        &self.tensor
    }

    /// Gives the tensor back.
    pub fn into_tensor(self) -> Tensor<(usize, usize), E, D> {
        self.tensor
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> EmbeddingSource for DfdxTable<E, D> {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        dims(&self.tensor)[0]
    }

    fn embedding_dim(&self) -> usize {
        dims(&self.tensor)[1]
    }

    fn dtype(&self) -> DType {
        E::DTYPE
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        self.check_ids(ids)?;
        let values = D::read_rows(&self.tensor, ids)?;
        Ok(TokenRows::new(values, ids.len(), self.embedding_dim())?)
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> WriteRows for DfdxTable<E, D> {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<()> {
        self.check_write(ids, rows)?;
        D::write_rows(&mut self.tensor, ids, &to_elements("rows to write", rows)?)
    }
}

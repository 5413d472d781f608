//! A table in memory.

use std::fmt;

use ndarray::{ArrayBase, ArrayView2, Data, DataMut, Ix2, RawDataClone};
use trainable_tokens_core::{
    DType, Element, EmbeddingSource, HostTable, RowRef, TokenId, TokenRows, WriteRows,
};

use crate::Error;

/// An embedding table held by an ndarray array: owned, shared or borrowed, never copied.
///
/// Rows are written in place; only an `ArcArray` that has other handles copies itself first, as it always does, and the
/// other handles keep the old rows.
pub struct NdTable<S: Data>(ArrayBase<S, Ix2>);

impl<S: Data<Elem: Element>> NdTable<S> {
    /// Wraps a row-major array of shape `[V, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if rows are not contiguous and in order: wrapping must not copy.
    pub fn new(array: ArrayBase<S, Ix2>) -> Result<Self, Error> {
        if array.is_standard_layout() {
            return Ok(Self(array));
        }
        Err(Error::Layout {
            shape: array.shape().to_vec(),
            strides: array.strides().to_vec(),
        })
    }

    /// The array, as it is now.
    pub fn view(&self) -> ArrayView2<'_, S::Elem> {
        self.0.view()
    }

    /// Gives up the wrapper for its array.
    pub fn into_inner(self) -> ArrayBase<S, Ix2> {
        self.0
    }
}

impl<S: RawDataClone + Data> Clone for NdTable<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: Data> fmt::Debug for NdTable<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NdTable")
            .field("shape", &self.0.shape())
            .finish_non_exhaustive()
    }
}

impl<S: Data<Elem: Element> + Sync> EmbeddingSource for NdTable<S> {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.0.nrows()
    }

    fn embedding_dim(&self) -> usize {
        self.0.ncols()
    }

    fn dtype(&self) -> DType {
        S::Elem::DTYPE
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows, Error> {
        Ok(self.collect_rows(ids)?)
    }
}

impl<S: Data<Elem: Element> + Sync> HostTable for NdTable<S> {
    #[inline]
    fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
        let dim = self.0.ncols();
        let row = self.0.as_slice()?.get(id.row() * dim..(id.row() + 1) * dim)?;
        (id.row() < self.0.nrows()).then(|| S::Elem::row_ref(row))
    }
}

impl<S: DataMut<Elem: Element> + Sync> WriteRows for NdTable<S> {
    fn write_rows(&mut self, ids: &[TokenId], rows: &TokenRows) -> Result<(), Error> {
        self.check_write(ids, rows)?;
        let dim = self.0.ncols();
        let values = <S::Elem as Element>::data(rows.data()).unwrap_or_default();
        let Some(table) = self.0.as_slice_mut() else {
            return Ok(());
        };
        for (id, row) in ids.iter().zip(values.chunks_exact(dim.max(1))) {
            table[id.row() * dim..][..dim].copy_from_slice(row);
        }
        Ok(())
    }
}

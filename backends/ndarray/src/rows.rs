//! The trained rows and their gradient, on the host.

use std::marker::PhantomData;

use trainable_tokens_core::{BackendError, DType, DeltaStore, HostRows, RowGradients, TokenRows};

/// The trained rows, in host memory; optimizers update them in place.
///
/// `E` is the error of the table that they belong to.
#[derive(Clone, Debug)]
pub struct NdRows<E> {
    host: HostRows,
    error: PhantomData<fn() -> E>,
}

impl<E> NdRows<E> {
    /// Wraps rows.
    pub(crate) fn new(host: HostRows) -> Self {
        Self {
            host,
            error: PhantomData,
        }
    }

    pub(crate) fn host(&self) -> &HostRows {
        &self.host
    }

    /// Borrows the rows, `[k, D]` in slot order.
    pub fn rows(&self) -> &TokenRows {
        self.host.rows()
    }
}

impl<E: BackendError> DeltaStore for NdRows<E> {
    type Error = E;

    fn num_rows(&self) -> usize {
        self.rows().num_rows()
    }

    fn embedding_dim(&self) -> usize {
        self.rows().embedding_dim()
    }

    fn dtype(&self) -> DType {
        self.rows().dtype()
    }

    fn read(&self) -> Result<TokenRows, E> {
        Ok(self.rows().clone())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<(), E> {
        self.check_write(rows)?;
        self.host.rows_mut().clone_from(rows);
        Ok(())
    }

    fn update(
        &mut self,
        change: &mut dyn FnMut(&mut TokenRows) -> trainable_tokens_core::Result<()>,
    ) -> Result<(), E> {
        Ok(change(self.host.rows_mut())?)
    }
}

/// What this backend's explicit backward passes add up: the gradients of the trained rows of every adapter.
pub type NdGradient = RowGradients;

//! The trained rows.

use crate::{BackendError, DType, TokenRows};

/// The `k x D` trained rows, as the framework's own trainable leaf.
///
/// They are the new rows themselves: lookup and merge put them in place of the base rows.
///
/// # Contract
///
/// 1. The shape and the element type never change.
/// 2. [`read`](Self::read) returns what was last written, bit for bit, in slot order.
/// 3. [`write`](Self::write) replaces all rows; another shape or element type is refused and changes nothing.
/// 4. A written row is seen by the next lookup, through every layer that shares the store.
pub trait DeltaStore {
    /// The backend's error.
    type Error: BackendError;

    /// How many rows train (`k`).
    fn num_rows(&self) -> usize;
    /// Length of a row (`D`).
    fn embedding_dim(&self) -> usize;
    /// Element type of the rows.
    fn dtype(&self) -> DType;
    /// Copies the rows to the host.
    ///
    /// # Errors
    ///
    /// When the framework fails.
    fn read(&self) -> Result<TokenRows, Self::Error>;
    /// Replaces the rows.
    ///
    /// # Errors
    ///
    /// By clause 3, or when the framework fails.
    fn write(&mut self, rows: &TokenRows) -> Result<(), Self::Error>;

    /// Lets `change` rewrite the rows, keeping their shape and element type; stores in host memory do it in place.
    ///
    /// # Errors
    ///
    /// Those of `change`, [`read`](Self::read) and [`write`](Self::write).
    fn update(
        &mut self,
        change: &mut dyn FnMut(&mut TokenRows) -> crate::Result<()>,
    ) -> Result<(), Self::Error> {
        let mut rows = self.read()?;
        change(&mut rows)?;
        self.write(&rows)
    }

    /// The checks of clause 3, for implementations to call first.
    ///
    /// # Errors
    ///
    /// By clause 3.
    fn check_write(&self, rows: &TokenRows) -> crate::Result<()> {
        rows.expect_shape("trained rows", self.num_rows(), self.embedding_dim())?;
        rows.expect_dtype("trained rows", self.dtype())
    }
}

//! The layer as a module of dfdx's.

use dfdx::nn::{Module, NonMutableModule};
use dfdx::shapes::{Dim, HasShape};
use dfdx::tensor::{SplitTape, Tape, Tensor};
use dfdx::tensor_ops::ReshapeTo;
use trainable_tokens_core::EmbeddingSource;

use super::TrainableTokens;
use crate::convert::{dims, ids_of};
use crate::head::check_adapters;
use crate::{DfdxDevice, DfdxElement, Error, Result};

impl<E: DfdxElement, D: DfdxDevice<E>> NonMutableModule for TrainableTokens<E, D> {}

impl<N: Dim, E, D, T> Module<Tensor<(N,), usize, D, T>> for TrainableTokens<E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(N,), usize, D, T>) -> Result<Self::Output> {
        let (ids, tape) = ids.split_tape();
        let ids_on_host = ids_of(&ids, self.table().vocab_size())?;
        let rows = self.lookup(&ids_on_host, tape)?;
        let shape = (ids.shape().0, dims(&rows)[1]);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

impl<B: Dim, N: Dim, E, D, T> Module<Tensor<(B, N), usize, D, T>> for TrainableTokens<E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(B, N), usize, D, T>) -> Result<Self::Output> {
        self.deep(ids, |ids, tape| self.lookup(ids, tape))
    }
}

impl<B: Dim, N: Dim, E, D, T> Module<(Tensor<(B, N), usize, D, T>, &[Option<&str>])> for TrainableTokens<E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(
        &self,
        (ids, adapters): (Tensor<(B, N), usize, D, T>, &[Option<&str>]),
    ) -> Result<Self::Output> {
        check_adapters(ids.shape().0, adapters)?;
        self.deep(ids, |ids, tape| self.lookup_mixed(ids, adapters, tape))
    }
}

/// A row for each token of a batch of examples.
type Deep<B, N, E, D, T> = Tensor<(B, N, usize), E, D, T>;

impl<E: DfdxElement, D: DfdxDevice<E>> TrainableTokens<E, D> {
    /// Rows of a batch of examples, in its shape.
    fn deep<B: Dim, N: Dim, T: Tape<E, D>>(
        &self,
        ids: Tensor<(B, N), usize, D, T>,
        lookup: impl FnOnce(&[u32], T) -> Result<Tensor<(usize, usize), E, D, T>>,
    ) -> Result<Deep<B, N, E, D, T>> {
        let (ids, tape) = ids.split_tape();
        let rows = lookup(&ids_of(&ids, self.table().vocab_size())?, tape)?;
        let shape = (ids.shape().0, ids.shape().1, dims(&rows)[1]);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

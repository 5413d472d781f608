//! The operations: the lookup and the head as nodes of dfdx's graph that make no gradient of the table.
//!
//! An operation of one's own is a tape that gets a backward pass (`Tape::add_backward_op`). On the CPU the storage
//! of a gradient is a slice, and a tensor is read by indexing. On other devices neither can be reached from outside
//! dfdx, so there every step is composed of dfdx's own operations on tensors without a tape ([`composed`]).

#[cfg(any(test, feature = "cuda"))]
mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod head;
mod parts;
mod rows;
#[cfg(test)]
mod tests;

use dfdx::shapes::{Axes2, Dtype, Rank1, Shape};
use dfdx::tensor::{Gradients, Storage, Tape, Tensor, TensorFromVec};
use dfdx::tensor_ops::{Device, GatherTo, PermuteTo};
use trainable_tokens_core::{LookupPlan, RowTransform, TokenId};

pub(crate) use head::{Head, project};
pub(crate) use parts::{join_rows, split_rows};
pub(crate) use rows::{Combined, Leaf, NewRows};

use crate::convert::{Matrix, dims};
use crate::{DfdxElement, Result};

/// A device that tables can lie on: dfdx's `Cpu`, and its `Cuda` with the feature `cuda`.
pub trait DfdxDevice<E: DfdxElement>: Kernels<E> {}

impl<E: DfdxElement, D: Kernels<E>> DfdxDevice<E> for D {}

/// A single element whose gradient tells whether a backward pass reached the rows it belongs to: a missing gradient
/// of the rows themselves could not be told from zeros without a panic.
pub(crate) type Flag<E, D> = Tensor<Rank1<1>, E, D>;

/// The lookup of a batch.
#[derive(Debug)]
pub struct Lookup<'a, E: DfdxElement, D: Storage<E>> {
    /// The frozen table.
    pub(crate) base: &'a Matrix<E, D>,
    /// The rows that replace some of it.
    pub(crate) rows: Option<&'a NewRows<E, D>>,
    pub(crate) plan: &'a LookupPlan,
    pub(crate) transform: RowTransform,
}

impl<E: DfdxElement, D: Kernels<E>> Lookup<'_, E, D> {
    /// The rows `[N, D]`, as a node of `tape` if there are trained rows.
    ///
    /// # Errors
    ///
    /// For a plan that was made for another table or for other rows, and when dfdx fails.
    pub(crate) fn forward<T: Tape<E, D>>(&self, tape: T) -> Result<Matrix<E, D, T>> {
        let num_rows = self.rows.map(|rows| dims(rows.tensor())[0]);
        self.plan.expect_fits(dims(self.base)[0], num_rows)?;
        D::lookup(self, tape)
    }
}

/// What differs from device to device.
pub trait Kernels<E: DfdxElement>: Device<E> + Device<E::Compute> {
    /// Copies rows of a table, whose ids are checked, to the host.
    fn read_rows(table: &Matrix<E, Self>, ids: &[TokenId]) -> Result<Vec<E>>;
    /// Overwrites rows of a table, whose ids and sizes are checked.
    fn write_rows(table: &mut Matrix<E, Self>, ids: &[TokenId], values: &[E]) -> Result<()>;
    /// [`Lookup::forward`], checked.
    fn lookup<T: Tape<E, Self>>(lookup: &Lookup<'_, E, Self>, tape: T) -> Result<Matrix<E, Self, T>>;
    /// Puts the columns of `part` `[N, c]` at `columns` of `logits` `[N, V]`.
    fn override_columns(
        logits: Matrix<E, Self>,
        part: Matrix<E, Self>,
        columns: &[TokenId],
    ) -> Result<Matrix<E, Self>>;
    /// Whether the gradients of trained rows are summed in the compute type, whatever the table's.
    const WIDE_SUMS: bool;
    /// Adds to all that [`Leaf`] says of the gradient of trained rows, for each of the leaves that they are made of.
    fn add_row_gradient(
        gradients: &mut Gradients<E, Self>,
        rows: &NewRows<E, Self>,
        add: Matrix<E::Compute, Self>,
    ) -> Result<(), Self::Err>;
    /// Adds to the gradient of a contiguous `leaf`.
    fn add_gradient(
        gradients: &mut Gradients<E, Self>,
        leaf: &Matrix<E, Self>,
        add: Matrix<E, Self>,
    ) -> Result<(), Self::Err>;
}

/// Notes that a backward pass reached the rows of `flag`.
fn mark<E: DfdxElement, D: Device<E>>(
    gradients: &mut Gradients<E, D>,
    flag: Option<&Flag<E, D>>,
) -> Result<(), D::Err> {
    match flag {
        None => Ok(()),
        Some(flag) => flag
            .device()
            .try_fill_with_ones(gradients.get_or_alloc_mut(flag)?),
    }
}

/// Makes the gradient of a tensor zero, whatever it is.
pub(crate) fn zero_gradient<S: Shape, E: Dtype, D: Device<E>>(
    gradients: &mut Gradients<E, D>,
    tensor: &Tensor<S, E, D>,
) -> Result<(), D::Err> {
    tensor
        .device()
        .try_fill_with_zeros(gradients.get_or_alloc_mut(tensor)?)
}

/// The transpose, by strides.
fn transpose<E, D: Device<E>>(tensor: Matrix<E, D>) -> Result<Matrix<E, D>, D::Err>
where
    E: Dtype,
{
    tensor.try_permute::<(usize, usize), Axes2<1, 0>>()
}

/// The rows `rows` of a matrix, of which there is at least one.
fn select<E, D: Device<E>>(table: &Matrix<E, D>, rows: Vec<usize>) -> Result<Matrix<E, D>, D::Err>
where
    E: Dtype,
{
    table.clone().try_gather(indices(table.device(), rows)?)
}

/// Indices of rows.
type Indices<D> = Tensor<(usize,), usize, D>;

fn indices<D: TensorFromVec<usize>>(device: &D, rows: Vec<usize>) -> Result<Indices<D>, D::Err> {
    let len = rows.len();
    device.try_tensor_from_vec(rows, (len,))
}

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
#[cfg(test)]
mod tests;

use dfdx::shapes::{Axes2, Dtype, Rank1, Shape};
use dfdx::tensor::{Gradients, Storage, Tape, Tensor};
use dfdx::tensor_ops::{Device, GatherTo, PermuteTo};
use trainable_tokens_core::{LookupPlan, RowTransform, TokenId};

pub(crate) use head::{Head, project};

use crate::convert::{Matrix, dims};
use crate::{DfdxElement, Result};

/// A device that tables can lie on: dfdx's `Cpu`, and its `Cuda` with the feature `cuda`.
pub trait DfdxDevice<E: DfdxElement>: Kernels<E> {}

impl<E: DfdxElement, D: Kernels<E>> DfdxDevice<E> for D {}

/// A single element whose gradient tells whether a backward pass reached the rows it belongs to: a missing gradient
/// of the rows themselves could not be told from zeros without a panic.
pub(crate) type Flag<E, D> = Tensor<Rank1<1>, E, D>;

/// The trained rows in dfdx's graph, and what their gradients come to.
#[derive(Clone, Debug)]
pub struct Leaf<E: DfdxElement, D: Storage<E>> {
    /// The rows `[k, D]`, in the table's element type. Their gradient is what dfdx's own optimizers see.
    pub(crate) rows: Matrix<E, D>,
    /// What a backward pass marks, where someone asks for it.
    pub(crate) reached: Option<Flag<E, D>>,
    /// A tensor in whose gradient, that of `rows` would be rounded, sums of the compute type gather bit for bit.
    pub(crate) sums: Option<Matrix<E, D>>,
}

impl<E: DfdxElement, D: Kernels<E>> Leaf<E, D> {
    /// Rows of which nobody but dfdx wants the gradient.
    pub(crate) fn plain(rows: Matrix<E, D>) -> Self {
        let (reached, sums) = (None, None);
        Self { rows, reached, sums }
    }

    /// Notes that a backward pass reached the rows, which then have a gradient, if only of zeros.
    fn mark(&self, gradients: &mut Gradients<E, D>) -> Result<(), D::Err> {
        mark(gradients, self.reached.as_ref())?;
        if let Some(sums) = &self.sums {
            gradients.try_alloc_for(sums)?;
        }
        gradients.try_alloc_for(&self.rows)
    }
}

/// The lookup of a batch.
#[derive(Debug)]
pub struct Lookup<'a, E: DfdxElement, D: Storage<E>> {
    /// The frozen table.
    pub(crate) base: &'a Matrix<E, D>,
    /// The rows that replace some of it.
    pub(crate) leaf: Option<&'a Leaf<E, D>>,
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
        let num_rows = self.leaf.map(|leaf| dims(&leaf.rows)[0]);
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
    /// Adds to all that [`Leaf`] says of the gradient of trained rows.
    fn add_row_gradient(
        gradients: &mut Gradients<E, Self>,
        leaf: &Leaf<E, Self>,
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
    let len = rows.len();
    let rows: Tensor<(usize,), usize, D> = table.device().try_tensor_from_vec(rows, (len,))?;
    table.clone().try_gather(rows)
}

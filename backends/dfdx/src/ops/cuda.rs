//! CUDA: every operation is composed.

use dfdx::tensor::{Cuda, CudaError, Gradients, Tape};
use dfdx::tensor_ops::Device;
use trainable_tokens_core::TokenId;

use super::{Kernels, Lookup, NewRows, composed};
use crate::convert::Matrix;
use crate::{DfdxElement, Error, Result};

impl<E: DfdxElement> Kernels<E> for Cuda
where
    Cuda: Device<E> + Device<E::Compute>,
{
    fn read_rows(table: &Matrix<E, Cuda>, ids: &[TokenId]) -> Result<Vec<E>> {
        composed::read_rows(table, ids)
    }

    fn write_rows(_: &mut Matrix<E, Cuda>, ids: &[TokenId], _: &[E]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: "overwriting rows of a table on CUDA",
            why: "dfdx writes a tensor there as a whole or not at all",
        })
    }

    fn lookup<T: Tape<E, Cuda>>(lookup: &Lookup<'_, E, Cuda>, tape: T) -> Result<Matrix<E, Cuda, T>> {
        composed::lookup(lookup, tape)
    }

    fn override_columns(
        logits: Matrix<E, Cuda>,
        part: Matrix<E, Cuda>,
        columns: &[TokenId],
    ) -> Result<Matrix<E, Cuda>> {
        composed::override_columns(logits, part, columns)
    }

    // Bits cannot be taken apart by operations on tensors: over a table of `f16` each sum is rounded.
    const WIDE_SUMS: bool = false;

    fn add_row_gradient(
        gradients: &mut Gradients<E, Cuda>,
        rows: &NewRows<E, Cuda>,
        add: Matrix<E::Compute, Cuda>,
    ) -> Result<(), CudaError> {
        for (leaf, part) in rows.leaves().iter().zip(composed::split_gradient(rows, add)?) {
            composed::add_gradient(gradients, &leaf.rows, E::narrow(part)?)?;
        }
        Ok(())
    }

    fn add_gradient(
        gradients: &mut Gradients<E, Cuda>,
        leaf: &Matrix<E, Cuda>,
        add: Matrix<E, Cuda>,
    ) -> Result<(), CudaError> {
        composed::add_gradient(gradients, leaf, add)
    }
}

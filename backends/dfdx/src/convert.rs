//! Between dfdx's tensors and rows on the host.

use std::borrow::Cow;

use dfdx::shapes::{HasShape, RealizeShapeTo, Shape};

use dfdx::tensor::{NoneTape, Storage, Tape, Tensor, TensorFromVec};
use dfdx::tensor_ops::RealizeTo;
use trainable_tokens_core::{Element, Error as CoreError, TokenRows};

use crate::{DfdxElement, Error, Result};

/// A matrix whose sizes are known at runtime.
pub(crate) type Matrix<E, D, T = NoneTape> = Tensor<(usize, usize), E, D, T>;

/// The sizes of a two-dimensional tensor.
pub(crate) fn dims<E, D: Storage<E>, T>(tensor: &Matrix<E, D, T>) -> [usize; 2] {
    tensor.shape().concrete()
}

/// Forgets at compile time what sizes a matrix has; the tensor keeps its identity.
pub(crate) fn at_runtime<S, E, D, T>(tensor: Tensor<S, E, D, T>) -> Result<Matrix<E, D, T>>
where
    S: Shape<Concrete = [usize; 2]> + RealizeShapeTo<(usize, usize)>,
    E: DfdxElement,
    D: Storage<E>,
    T: Tape<E, D>,
{
    let got = tensor.shape().concrete();
    let realized = tensor.try_realize::<(usize, usize)>();
    realized.map_err(|_| CoreError::shape("tensor", &[0, 0], &got).into())
}

/// Makes a matrix of values, row-major.
pub(crate) fn matrix<E, D: TensorFromVec<E>>(
    device: &D,
    values: Vec<E>,
    num_rows: usize,
    dim: usize,
) -> Result<Matrix<E, D>> {
    let tensor = device.try_tensor_from_vec(values, (num_rows, dim));
    tensor.map_err(Error::dfdx)
}

/// The elements of any tensor in the order of its shape. dfdx's own `as_vec` panics without elements.
pub(crate) fn to_vec<S: Shape, E, D: Storage<E>, T>(tensor: &Tensor<S, E, D, T>) -> Vec<E> {
    if tensor.shape().num_elements() == 0 {
        return Vec::new();
    }
    tensor.as_vec()
}

/// Copies a matrix to the host, bit for bit.
pub(crate) fn to_rows<E: Element, D: Storage<E>, T>(tensor: &Matrix<E, D, T>) -> Result<TokenRows> {
    let [num_rows, dim] = dims(tensor);
    Ok(TokenRows::new(to_vec(tensor), num_rows, dim)?)
}

/// The elements of rows in the type `E`, rounded to nearest even; borrowed if they have it.
pub(crate) fn to_elements<'a, E: DfdxElement>(
    what: &'static str,
    rows: &'a TokenRows,
) -> Result<Cow<'a, [E]>> {
    if let Some(elements) = rows.as_slice::<E>() {
        return Ok(Cow::Borrowed(elements));
    }
    let (expected, got) = (E::DTYPE, rows.dtype());
    let rows = rows.to_dtype(E::DTYPE);
    let elements = rows.as_slice::<E>().map(<[E]>::to_vec);
    Ok(Cow::Owned(elements.ok_or(CoreError::DType {
        what,
        expected,
        got,
    })?))
}

/// Ids on the host. One that no `u32` can hold is refused here, one at or above `vocab_size` by whoever looks it up.
pub(crate) fn ids_of<S: Shape, D: Storage<usize>>(
    ids: &Tensor<S, usize, D>,
    vocab_size: usize,
) -> Result<Vec<u32>> {
    let narrow = |id: usize| {
        u32::try_from(id).map_err(|_| {
            let id = i64::try_from(id).unwrap_or(i64::MAX);
            CoreError::TokenOutOfRange { id, vocab_size }.into()
        })
    };
    to_vec(ids).into_iter().map(narrow).collect()
}

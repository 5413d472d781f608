//! Rows of a table on the host.

use std::borrow::Cow;
use std::fmt;

use half::{bf16, f16};

use crate::source::convert;
use crate::{DType, Element, Error, Result, RowRef};

/// The elements of rows, by element type.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RowData {
    /// Double precision.
    F64(Vec<f64>),
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
}

/// Runs one expression with `$values` bound to the vector of whatever element type the data has.
macro_rules! with_data {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            $crate::RowData::F64($values) => $body,
            $crate::RowData::F32($values) => $body,
            $crate::RowData::F16($values) => $body,
            $crate::RowData::BF16($values) => $body,
        }
    };
}
pub(crate) use with_data;

impl RowData {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        with_data!(self, values => values.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `num_rows x embedding_dim` elements on the host, row-major: rows read from a table, a delta, its gradient, or
/// a moment of its optimizer.
#[derive(Clone, PartialEq)]
pub struct TokenRows {
    data: RowData,
    num_rows: usize,
    embedding_dim: usize,
}

impl TokenRows {
    /// Wraps `values`, row-major.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `num_rows * embedding_dim` of them.
    pub fn new<T: Element>(values: Vec<T>, num_rows: usize, embedding_dim: usize) -> Result<Self> {
        if Some(values.len()) != num_rows.checked_mul(embedding_dim) {
            return Err(Error::shape("rows", &[num_rows, embedding_dim], &[values.len()]));
        }
        Ok(Self {
            data: T::into_data(values),
            num_rows,
            embedding_dim,
        })
    }

    /// Rows of zeros.
    pub fn zeros(dtype: DType, num_rows: usize, embedding_dim: usize) -> Self {
        let len = num_rows * embedding_dim;
        let data = match dtype {
            DType::F64 => RowData::F64(vec![0.0; len]),
            DType::F32 => RowData::F32(vec![0.0; len]),
            DType::F16 => RowData::F16(vec![f16::ZERO; len]),
            DType::BF16 => RowData::BF16(vec![bf16::ZERO; len]),
        };
        Self {
            data,
            num_rows,
            embedding_dim,
        }
    }

    /// Decodes little-endian bytes, as safetensors stores them.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the bytes are not exactly those of `num_rows * embedding_dim` elements.
    pub fn from_le_bytes(dtype: DType, num_rows: usize, embedding_dim: usize, bytes: &[u8]) -> Result<Self> {
        fn decode<T: Element>(bytes: &[u8], shape: [usize; 2]) -> Result<TokenRows> {
            let values = bytes
                .chunks_exact(T::DTYPE.size_in_bytes())
                .map(T::from_le_bytes)
                .collect();
            TokenRows::new::<T>(values, shape[0], shape[1])
        }
        if !bytes.len().is_multiple_of(dtype.size_in_bytes()) {
            return Err(Error::shape(
                "bytes of rows",
                &[num_rows, embedding_dim, dtype.size_in_bytes()],
                &[bytes.len()],
            ));
        }
        let shape = [num_rows, embedding_dim];
        match dtype {
            DType::F64 => decode::<f64>(bytes, shape),
            DType::F32 => decode::<f32>(bytes, shape),
            DType::F16 => decode::<f16>(bytes, shape),
            DType::BF16 => decode::<bf16>(bytes, shape),
        }
    }

    /// The little-endian bytes, as safetensors stores them.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.data.len() * self.dtype().size_in_bytes());
        with_data!(&self.data, values => values.iter().for_each(|x| x.extend_le_bytes(&mut out)));
        out
    }

    /// How many rows there are.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// The length of a row.
    pub fn embedding_dim(&self) -> usize {
        self.embedding_dim
    }

    /// `[num_rows, embedding_dim]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.num_rows, self.embedding_dim]
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// The elements, row-major.
    pub fn data(&self) -> &RowData {
        &self.data
    }

    /// Gives up the rows for their elements, row-major.
    pub fn into_data(self) -> RowData {
        self.data
    }

    /// The elements, row-major; their number cannot change.
    pub(crate) fn data_mut(&mut self) -> &mut RowData {
        &mut self.data
    }

    /// The elements as `T`, if that is their type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        T::data(&self.data)
    }

    /// The elements as `T`, if that is their type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        T::data_mut(&mut self.data)
    }

    /// Borrows row `index`, if there is one.
    pub fn row(&self, index: usize) -> Option<RowRef<'_>> {
        if index >= self.num_rows {
            return None;
        }
        let range = index * self.embedding_dim..(index + 1) * self.embedding_dim;
        Some(match &self.data {
            RowData::F64(v) => RowRef::F64(&v[range]),
            RowData::F32(v) => RowRef::F32(&v[range]),
            RowData::F16(v) => RowRef::F16(&v[range]),
            RowData::BF16(v) => RowRef::BF16(&v[range]),
        })
    }

    /// The rows in another element type, rounded to nearest even; the same bits if it is the same type.
    #[must_use]
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        let data = match dtype {
            DType::F64 => RowData::F64(self.to_f64_vec()),
            DType::F32 => RowData::F32(self.to_f32_vec()),
            DType::F16 => RowData::F16(with_data!(&self.data, values => converted(values))),
            DType::BF16 => RowData::BF16(with_data!(&self.data, values => converted(values))),
        };
        Self { data, ..*self }
    }

    /// The rows in another element type, borrowed if they have it.
    pub(crate) fn like_dtype(&self, dtype: DType) -> Cow<'_, Self> {
        if dtype == self.dtype() {
            Cow::Borrowed(self)
        } else {
            Cow::Owned(self.to_dtype(dtype))
        }
    }

    /// The elements in `f32` (exact unless they are `f64`).
    pub fn to_f32_vec(&self) -> Vec<f32> {
        with_data!(&self.data, values => converted(values))
    }

    /// The elements in `f64`, exactly.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        with_data!(&self.data, values => converted(values))
    }

    /// Whether both hold the same bits in the same type and shape (unlike `==`, NaN equals itself and `0.0` does
    /// not equal `-0.0`).
    pub fn bits_eq(&self, other: &Self) -> bool {
        self.shape() == other.shape()
            && self.dtype() == other.dtype()
            && self.to_le_bytes() == other.to_le_bytes()
    }

    /// The L2 norm of each row, accumulated in `f64`.
    pub fn row_norms(&self) -> Vec<f64> {
        let values = self.to_f64_vec();
        if self.embedding_dim == 0 {
            return vec![0.0; self.num_rows];
        }
        values
            .chunks_exact(self.embedding_dim)
            .map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt())
            .collect()
    }

    /// The L2 norm of all elements, accumulated in `f64`: sums of every eighth square, in their order, then the sum of these.
    pub fn norm(&self) -> f64 {
        with_data!(&self.data, values => sum_of_squares(values)).sqrt()
    }

    /// Multiplies every element by `factor`, in the type's arithmetic.
    pub fn scale(&mut self, factor: f64) {
        fn apply<T: Element>(values: &mut [T], factor: f64) {
            let factor = T::Compute::from_f64(factor);
            values
                .iter_mut()
                .for_each(|x| *x = T::from_compute(x.to_compute() * factor));
        }
        with_data!(&mut self.data, v => apply(v, factor));
    }

    /// The first element that is not finite, as (row, column).
    pub fn first_non_finite(&self) -> Option<(usize, usize)> {
        let index = with_data!(&self.data, v => v.iter().position(|x| !Element::to_f64(*x).is_finite()))?;
        Some((index / self.embedding_dim, index % self.embedding_dim))
    }

    /// Checks that the shape is `[num_rows, embedding_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], naming `what`.
    pub fn expect_shape(&self, what: &'static str, num_rows: usize, embedding_dim: usize) -> Result<()> {
        if self.shape() == [num_rows, embedding_dim] {
            return Ok(());
        }
        Err(Error::Shape {
            what,
            expected: vec![num_rows, embedding_dim],
            got: self.shape().to_vec(),
        })
    }

    /// Checks that the element type is `expected`.
    ///
    /// # Errors
    ///
    /// [`Error::DType`], naming `what`.
    pub fn expect_dtype(&self, what: &'static str, expected: DType) -> Result<()> {
        let got = self.dtype();
        if got == expected {
            return Ok(());
        }
        Err(Error::DType { what, expected, got })
    }
}

/// The elements in another type.
fn converted<S: Element, T: Element>(values: &[S]) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    convert(values, &mut out);
    out
}

/// Eight sums at a time, which do not wait for each other.
fn sum_of_squares<T: Element>(values: &[T]) -> f64 {
    let mut sums = [0f64; 8];
    for values in values.chunks(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(values) {
            let value = value.to_f64();
            *sum += value * value;
        }
    }
    sums.iter().sum()
}

impl fmt::Debug for TokenRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRows")
            .field("dtype", &self.dtype())
            .field("shape", &self.shape())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_length_is_refused() {
        assert!(TokenRows::new(vec![0f32; 5], 2, 3).is_err());
        assert!(TokenRows::new(vec![0f32; 0], usize::MAX, 3).is_err());
        assert!(TokenRows::from_le_bytes(DType::F32, 1, 1, &[0; 5]).is_err());
        assert!(TokenRows::from_le_bytes(DType::F32, 2, 1, &[0; 4]).is_err());
    }

    #[test]
    fn narrowing_from_f32_and_from_f64_agree() {
        let values = vec![1.0f32, 0.1, -3.3333, 65_519.9, 1e-8, f32::INFINITY];
        let single = TokenRows::new(values.clone(), 2, 3).unwrap();
        let double = TokenRows::new(values.iter().map(|x| f64::from(*x)).collect(), 2, 3).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            assert!(single.to_dtype(dtype).bits_eq(&double.to_dtype(dtype)));
        }
    }

    #[test]
    fn bits_tell_zeros_apart() {
        let plus = TokenRows::new(vec![0.0f32], 1, 1).unwrap();
        let minus = TokenRows::new(vec![-0.0f32], 1, 1).unwrap();
        assert_eq!(plus, minus);
        assert!(!plus.bits_eq(&minus));
    }
}

//! A frozen table of 8-bit integers.

use crate::rows::with_data;
use crate::{DType, Element, EmbeddingSource, Error, HostTable, Result, RowRef, TokenId, TokenRows};

/// A frozen table of which each row is 8-bit integers times a factor of its own (row-wise absmax quantisation, as
/// `LLM.int8()` has it: arXiv 2208.07339).
///
/// Only rows that are read or looked up are dequantised, one at a time. Trained rows are not quantised: they train and
/// are used in their own precision. The table cannot be merged into: it does not implement
/// [`WriteRows`](crate::WriteRows).
///
/// # Contract
///
/// Element `j` of row `i` is `values[i * D + j] * scales[i]`, computed in `f32` and rounded to the table's
/// [`dtype`](EmbeddingSource::dtype).
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Table {
    values: Vec<i8>,
    scales: Vec<f32>,
    embedding_dim: usize,
    dtype: DType,
}

impl Int8Table {
    /// Takes `values` `[V, D]`, row-major, and a factor for each row, `[V]`; elements come out in `dtype`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `V * D` values; [`Error::Hyperparameter`] for a factor that is not finite;
    /// [`Error::VocabularyTooLarge`].
    pub fn new(values: Vec<i8>, scales: Vec<f32>, embedding_dim: usize, dtype: DType) -> Result<Self> {
        let vocab_size = scales.len();
        if u32::try_from(vocab_size).is_err() {
            return Err(Error::VocabularyTooLarge { vocab_size });
        }
        if Some(values.len()) != vocab_size.checked_mul(embedding_dim) {
            let expected = [vocab_size, embedding_dim];
            return Err(Error::shape("quantised values", &expected, &[values.len()]));
        }
        match scales.iter().find(|scale| !scale.is_finite()) {
            Some(scale) => Err(Error::Hyperparameter {
                name: "scale of a quantised row",
                value: f64::from(*scale),
                must: "finite",
            }),
            None => Ok(Self {
                values,
                scales,
                embedding_dim,
                dtype,
            }),
        }
    }

    /// Quantises rows: the largest magnitude of each row becomes 127, and every value goes to the nearest integer, ties
    /// to even. Elements come out in the type of `rows`.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] for a value that is not finite; [`Error::VocabularyTooLarge`].
    pub fn quantize(rows: &TokenRows) -> Result<Self> {
        fn quantize<T: Element>(values: &[T], dim: usize) -> (Vec<i8>, Vec<f32>) {
            let mut scales = Vec::new();
            let mut quantized = Vec::with_capacity(values.len());
            for row in values.chunks_exact(dim.max(1)) {
                let largest = row.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
                let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
                // Division by a subnormal factor may leave the range; the cast keeps to its ends.
                #[expect(clippy::cast_possible_truncation, reason = "rounded and within the range")]
                let nearest = |x: &T| (x.to_f32() / scale).round_ties_even() as i8;
                quantized.extend(row.iter().map(nearest));
                scales.push(scale);
            }
            (quantized, scales)
        }
        if let Some((row, column)) = rows.first_non_finite() {
            let value = rows.to_f64_vec()[row * rows.embedding_dim() + column];
            return Err(Error::Hyperparameter {
                name: "value to quantise",
                value,
                must: "finite",
            });
        }
        let dim = rows.embedding_dim();
        let (values, mut scales) = with_data!(rows.data(), values => quantize(values, dim));
        scales.resize(rows.num_rows(), 1.0);
        Self::new(values, scales, dim, rows.dtype())
    }
}

impl EmbeddingSource for Int8Table {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.scales.len()
    }

    fn embedding_dim(&self) -> usize {
        self.embedding_dim
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        self.collect_rows(ids)
    }
}

impl HostTable for Int8Table {
    fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
        let scale = *self.scales.get(id.row())?;
        let values = self.values.get(id.row() * self.embedding_dim..)?;
        Some(RowRef::Int8 {
            values: values.get(..self.embedding_dim)?,
            scale,
            dtype: self.dtype,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_within_half_a_step() {
        let rows = TokenRows::new(vec![1.0f32, -0.5, 0.254, 0.0, 0.0, 0.0], 2, 3).unwrap();
        let table = Int8Table::quantize(&rows).unwrap();
        let back = table.read_rows(&[TokenId(1), TokenId(0)]).unwrap().to_f32_vec();
        assert_eq!(back[..3], [0.0; 3]);
        for (got, want) in back[3..].iter().zip([1.0, -0.5, 0.254]) {
            assert!((got - want).abs() <= 0.5 / 127.0 + 1e-6, "{got} {want}");
        }
        assert!(table.read_rows(&[TokenId(2)]).is_err());
    }

    #[test]
    fn elements_are_rounded_to_the_tables_type() {
        let table = Int8Table::new(vec![127, -3], vec![0.011], 2, DType::BF16).unwrap();
        let row = table.read_rows(&[TokenId(0)]).unwrap();
        let want = [127.0f32 * 0.011, -3.0 * 0.011].map(half::bf16::from_f32);
        assert_eq!(row.as_slice::<half::bf16>().unwrap(), want);
        let mut wide = [0f32; 2];
        table.row(TokenId(0)).unwrap().decode_into(&mut wide);
        assert_eq!(wide, want.map(half::bf16::to_f32));
    }

    #[test]
    fn what_cannot_be_a_table_is_refused() {
        assert!(Int8Table::new(vec![1, 2, 3], vec![1.0], 2, DType::F32).is_err());
        assert!(Int8Table::new(vec![1, 2], vec![f32::NAN], 2, DType::F32).is_err());
        let rows = TokenRows::new(vec![1.0f32, f32::INFINITY], 1, 2).unwrap();
        assert!(Int8Table::quantize(&rows).is_err());
    }
}

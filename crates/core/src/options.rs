//! How a table is used besides its rows.

use crate::{DType, Element, Error, Padding, Result};

/// A factor on the rows that the embedding returns (Gemma, BART), applied once, after the override. The head never
/// sees it, and trained rows live in the unscaled space.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EmbedScale {
    /// Multiply by the number, rounded to the precision that the element type computes in (BART).
    Exact(f64),
    /// Round the number to the table's element type first, then multiply (Gemma keeps it as a tensor).
    TableDType(f64),
}

impl EmbedScale {
    /// The factor for a table of type `dtype`.
    pub fn factor(self, dtype: DType) -> f64 {
        match (self, dtype) {
            (Self::Exact(factor), _) | (Self::TableDType(factor), DType::F64) => factor,
            (Self::TableDType(factor), DType::F32) => f64::from(<f32 as Element>::from_f64(factor)),
            (Self::TableDType(factor), DType::F16) => <half::f16 as Element>::from_f64(factor).to_f64(),
            (Self::TableDType(factor), DType::BF16) => <half::bf16 as Element>::from_f64(factor).to_f64(),
        }
    }
}

/// The greatest L2 norm of a looked-up row: torch's `max_norm` with its `norm_type` of 2.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct MaxNorm(f64);

impl MaxNorm {
    /// Checks the limit.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless `max_norm` is a finite number above 0.
    pub fn new(max_norm: f64) -> Result<Self> {
        if max_norm > 0.0 && max_norm.is_finite() {
            return Ok(Self(max_norm));
        }
        Err(Error::Hyperparameter {
            name: "max_norm",
            value: max_norm,
            must: "above 0",
        })
    }

    /// The limit.
    pub fn get(self) -> f64 {
        self.0
    }

    /// The factor that brings a row of L2 norm `norm` down to the limit, if it is above it
    /// (`torch/nn/functional.py`, `embedding_renorm_`).
    pub fn factor(self, norm: f64) -> Option<f64> {
        (norm > self.0).then(|| self.0 / (norm + 1e-7))
    }
}

/// How the table is used besides its rows; the names are those of `torch.nn.Embedding`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerOptions {
    /// The table's `padding_idx` and what it means for gradients.
    pub padding: Option<Padding>,
    /// The factor on looked-up rows.
    pub scale: Option<EmbedScale>,
    /// Whether a row's gradient from a lookup is divided by how often its id occurs in the batch.
    pub scale_grad_by_freq: bool,
    /// Looked-up rows, frozen or trained, that are longer than this are shortened to it. Neither the table nor the
    /// trained rows change, and gradients pass as if nothing had been shortened.
    pub max_norm: Option<MaxNorm>,
}

impl LayerOptions {
    /// What becomes of each row of a table of type `dtype`.
    pub fn transform(self, dtype: DType) -> RowTransform {
        RowTransform {
            max_norm: self.max_norm,
            scale: self.scale.map(|scale| scale.factor(dtype)),
        }
    }
}

/// What becomes of each looked-up row after the override: shortened by [`MaxNorm`] first, then scaled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowTransform {
    /// The greatest L2 norm of a row.
    pub max_norm: Option<MaxNorm>,
    /// The factor after that, rounded already where it must be.
    pub scale: Option<f64>,
}

impl RowTransform {
    /// Whether rows stay as they are, bit for bit.
    pub fn is_identity(self) -> bool {
        self == Self::default()
    }

    /// Changes a row in host memory that is already rounded to the table's element type. The norm is that of the
    /// row before, summed in `f64`; each product is computed in `T::Compute` and rounded to `T`.
    pub fn apply<T: Element>(self, row: &mut [T]) {
        if let Some(max_norm) = self.max_norm {
            let norm = row.iter().map(|x| x.to_f64()).map(|x| x * x).sum::<f64>().sqrt();
            if let Some(factor) = max_norm.factor(norm) {
                multiply(row, factor);
            }
        }
        if let Some(scale) = self.scale {
            multiply(row, scale);
        }
    }
}

fn multiply<T: Element>(row: &mut [T], factor: f64) {
    let factor = T::Compute::from_f64(factor);
    let mut wide = [T::Compute::default(); 128];
    for row in row.chunks_mut(wide.len()) {
        let wide = &mut wide[..row.len()];
        T::to_compute_slice(row, wide);
        wide.iter_mut().for_each(|x| *x *= factor);
        T::from_compute_slice(wide, row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shortened_and_then_scaled() {
        let transform = RowTransform {
            max_norm: Some(MaxNorm::new(2.5).unwrap()),
            scale: Some(2.0),
        };
        let mut long = [3.0f64, -4.0];
        transform.apply(&mut long);
        assert!(
            (long[0] - 3.0).abs() < 1e-6 && (long[1] + 4.0).abs() < 1e-6,
            "{long:?}"
        );
        let mut short = [0.5f32, -0.0];
        transform.apply(&mut short);
        assert_eq!(short.map(f32::to_bits), [1.0f32, -0.0].map(f32::to_bits));
        assert!(RowTransform::default().is_identity() && !transform.is_identity());
    }

    #[test]
    fn a_limit_must_be_above_zero() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(MaxNorm::new(bad).is_err(), "{bad}");
        }
    }
}

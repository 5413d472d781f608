//! What differs between two checkpoints, or two adapters.

mod adapters;
mod checkpoints;

use std::fmt;

pub use adapters::{AdapterDiff, ModuleDiff};
pub use checkpoints::{CheckpointDiff, TableDiff};
use safetensors::Dtype;
use trainable_tokens_core::{RowRef, TokenId};

use crate::file::TensorRef;

/// A tensor that differs, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDiff {
    /// Its name.
    pub tensor: String,
    /// What differs.
    pub difference: TensorDifference,
}

/// How two tensors of one name differ; of a shape that differs, the values are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorDifference {
    /// The second has no such tensor.
    OnlyInFirst,
    /// The first has no such tensor.
    OnlyInSecond,
    /// They have different element types.
    DType([Dtype; 2]),
    /// They have different shapes.
    Shape([Vec<usize>; 2]),
    /// Some elements have different bits.
    Values,
}

impl TensorDifference {
    /// Compares element type, shape and bits.
    fn of(first: &TensorRef<'_>, second: &TensorRef<'_>) -> Option<Self> {
        if first.dtype != second.dtype {
            return Some(Self::DType([first.dtype, second.dtype]));
        }
        if first.shape != second.shape {
            return Some(Self::Shape([first.shape.to_vec(), second.shape.to_vec()]));
        }
        (first.bytes != second.bytes).then_some(Self::Values)
    }
}

impl fmt::Display for TensorDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyInFirst => f.write_str("only in the first"),
            Self::OnlyInSecond => f.write_str("only in the second"),
            Self::DType([first, second]) => write!(f, "element types {first:?} and {second:?}"),
            Self::Shape([first, second]) => write!(f, "shapes {first:?} and {second:?}"),
            Self::Values => f.write_str("values"),
        }
    }
}

/// `"model.norm.weight" (values)`.
impl fmt::Display for TensorDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({})", self.tensor, self.difference)
    }
}

/// How far two rows of one token are apart, computed in `f64`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RowDiff {
    /// The token.
    pub id: TokenId,
    /// The L2 norm of each.
    pub norms: [f64; 2],
    /// The cosine of the angle between them; NaN if one of them is zero or not finite.
    pub cosine: f64,
    /// The L2 norm of their difference.
    pub distance: f64,
    /// Whether they are the same numbers: a NaN is the same as itself, 0 and -0 are not.
    pub is_same: bool,
}

impl RowDiff {
    /// Compares two rows as far as the shorter goes.
    pub fn of(id: TokenId, first: RowRef<'_>, second: RowRef<'_>) -> Self {
        let len = first.len().min(second.len());
        let [mut a, mut b] = [vec![0f64; len], vec![0f64; len]];
        first.decode_into(&mut a);
        second.decode_into(&mut b);
        let mut squares = [0.0; 2];
        let [mut dot, mut distance] = [0.0; 2];
        for (a, b) in a.iter().zip(&b) {
            squares[0] += a * a;
            squares[1] += b * b;
            dot += a * b;
            distance += (a - b) * (a - b);
        }
        // Of equal rows exactly 1: one root, not two.
        let cosine = dot / (squares[0] * squares[1]).sqrt();
        Self {
            id,
            norms: squares.map(f64::sqrt),
            // Rounding may take it past what a cosine can be; NaN stays.
            cosine: cosine.clamp(-1.0, 1.0),
            distance: distance.sqrt(),
            is_same: a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
        }
    }
}

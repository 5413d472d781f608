//! The decoder's operations, all of them differentiable: candle-nn's fast norms, softmax and rotary embeddings cut the
//! graph in silence.
//!
//! On the CPU each is one operation of candle's graph, with a backward pass of its own that keeps nothing but the
//! operands. On other devices it is composed of candle's operations, which is also what the tests compare with.

mod attention;
mod frozen;
mod gate;
mod norm;
mod parallel;
mod recompute;
mod storage;
#[cfg(test)]
mod tests;

pub(crate) use attention::{AttentionKind, Mask, Rotation, attention};
pub(crate) use frozen::{add_frozen, mul_frozen};
pub(crate) use gate::{activate, gate};
pub(crate) use norm::Norm;
pub(crate) use recompute::recompute;

use candle_core::DType;

/// The type that norms and softmax compute in.
pub(crate) fn working_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}

//! A backward pass that does not panic.

use burn::tensor::{Gradients, Tensor};
use trainable_tokens_core::Error as CoreError;

use crate::Result;

/// The gradients of `loss`, as [`Tensor::backward`] computes them, but with an error where that panics because the loss is
/// in no graph: a merged layer, a frozen model, a device without autodiff.
///
/// A loss can be used once; burn panics when its graph was used up by another backward pass before.
///
/// # Errors
///
/// [`CoreError::NoGradient`] if nothing that the loss depends on trains.
pub fn backward<const D: usize>(loss: &Tensor<D>) -> Result<Gradients> {
    if loss.is_tracked() {
        Ok(loss.backward())
    } else {
        Err(CoreError::NoGradient.into())
    }
}

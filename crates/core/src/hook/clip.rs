//! Gradient clipping.

use crate::{Error, OptimizerHook, Result, StepContext};

/// Scales the gradient down to an L2 norm, over all rows together (`torch.nn.utils.clip_grad_norm_`).
#[derive(Clone, Copy, Debug)]
pub struct ClipGradNorm {
    max_norm: f64,
}

impl ClipGradNorm {
    /// Clips to `max_norm`.
    ///
    /// # Errors
    ///
    /// [`Error::Hyperparameter`] unless `max_norm` is a number above 0.
    pub fn new(max_norm: f64) -> Result<Self> {
        if max_norm > 0.0 {
            return Ok(Self { max_norm });
        }
        Err(Error::Hyperparameter {
            name: "max_norm",
            value: max_norm,
            must: "above 0",
        })
    }
}

impl OptimizerHook for ClipGradNorm {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        let factor = self.max_norm / (context.gradient.norm() + 1e-6);
        // A norm that is not a number makes every gradient NaN, as in torch: the loss shows it at the next step.
        if factor < 1.0 || factor.is_nan() {
            context.gradient.scale(factor);
        }
        Ok(())
    }
}

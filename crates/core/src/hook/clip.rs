//! Gradient clipping.

use crate::{Error, OptimizerHook, Result, StepContext, TokenRows};

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

impl ClipGradNorm {
    /// Clips several gradients together: none is scaled unless all are.
    pub fn clip(&self, gradients: &mut [&mut TokenRows]) {
        let factor = self.max_norm / (joint_norm(gradients.iter().map(|gradient| &**gradient)) + 1e-6);
        // A norm that is not a number makes every gradient NaN, as in torch: the loss shows it at the next step.
        if factor < 1.0 || factor.is_nan() {
            gradients.iter_mut().for_each(|gradient| gradient.scale(factor));
        }
    }
}

/// The L2 norm of all elements of several gradients together.
pub fn joint_norm<'a>(gradients: impl IntoIterator<Item = &'a TokenRows>) -> f64 {
    let mut norms = gradients.into_iter().map(TokenRows::norm);
    let first = norms.next().unwrap_or_default();
    // One gradient's norm is its own, to the last bit.
    match norms.next() {
        None => first,
        Some(second) => [first, second]
            .into_iter()
            .chain(norms)
            .map(|norm| norm * norm)
            .sum::<f64>()
            .sqrt(),
    }
}

impl OptimizerHook for ClipGradNorm {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.clip(&mut [&mut *context.gradient]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_clipped_together() {
        let rows = |values: &[f64]| TokenRows::new(values.to_vec(), 1, values.len()).unwrap();
        let (mut a, mut b) = (rows(&[3.0, 0.0]), rows(&[0.0, 4.0, 12.0]));
        assert!((joint_norm([&a, &b]) - 13.0).abs() < 1e-12);
        let before = (a.norm(), b.norm());
        assert_eq!(joint_norm([&a]), a.norm());
        assert_eq!(joint_norm([]), 0.0);
        ClipGradNorm::new(26.0).unwrap().clip(&mut [&mut a, &mut b]);
        assert_eq!((a.norm(), b.norm()), before);
        ClipGradNorm::new(6.5).unwrap().clip(&mut [&mut a, &mut b]);
        assert!((a.norm() - 1.5).abs() < 1e-6, "{}", a.norm());
        assert!((joint_norm([&a, &b]) - 6.5).abs() < 1e-6);
    }
}

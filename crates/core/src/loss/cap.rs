//! The softcap of logits.

use num_traits::Float;

use super::Softcap;
use super::exponential::tanh;
use crate::Element;

/// `softcap * tanh(x / softcap)`, or nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap<C>(Option<C>);

impl<C: Float + Element> Cap<C> {
    pub(super) fn new(softcap: Option<Softcap>) -> Self {
        Self(softcap.map(|softcap| C::from_f64(softcap.get())))
    }

    /// Whether logits stay as they are.
    pub(super) fn is_none(self) -> bool {
        self.0.is_none()
    }

    pub(super) fn apply(self, logits: &mut [C]) {
        if let Some(softcap) = self.0 {
            for x in logits {
                *x = capped(*x, softcap);
            }
        }
    }

    pub(super) fn of(self, logit: C) -> C {
        self.0.map_or(logit, |softcap| capped(logit, softcap))
    }

    /// The derivative where the capped logit is `y`: that of `c * tanh(x / c)` is `1 - tanh(x / c)^2`.
    #[inline]
    pub(super) fn slope(self, y: C) -> C {
        match self.0 {
            None => C::one(),
            Some(softcap) => C::one() - (y / softcap) * (y / softcap),
        }
    }
}

#[inline]
fn capped<C: Float + Element>(logit: C, softcap: C) -> C {
    softcap * tanh(logit / softcap)
}

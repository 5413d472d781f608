//! Learning-rate schedules.

use std::f64::consts::PI;

/// The course of the learning rate, by transformers' formulas (`transformers/optimization.py`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// Always the same.
    #[default]
    Constant,
    /// Straight down to 0 at the end.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
}

impl Schedule {
    /// The factor on the learning rate at `step` (from 0) of `total`, after a linear rise over `warmup` steps.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `get_{constant,linear,cosine}_schedule_with_warmup` of transformers 5.23.0, 2 of 10 steps of warm-up.
    #[test]
    fn values_are_transformers() {
        let at = |schedule: Schedule| [0, 1, 2, 6, 9].map(|step| schedule.factor(step, 2, 10));
        assert_eq!(at(Schedule::Constant), [0.0, 0.5, 1.0, 1.0, 1.0]);
        assert_eq!(at(Schedule::Linear), [0.0, 0.5, 1.0, 0.5, 0.125]);
        for (got, want) in
            at(Schedule::Cosine)
                .into_iter()
                .zip([0.0, 0.5, 1.0, 0.5, 0.038_060_233_744_356_63])
        {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
    }
}

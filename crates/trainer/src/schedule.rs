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
    /// Falls with the root of the steps, whatever the length of the run.
    InverseSqrt,
}

/// The time scale of [`Schedule::InverseSqrt`] without a warm-up, in steps.
const TIMESCALE: f64 = 10_000.0;

impl Schedule {
    /// The factor on the learning rate at `step` (from 0) of `total`, after a linear rise over `warmup` steps.
    ///
    /// Where the schedule falls to 0, it falls to `min_ratio` instead (transformers' `min_lr_rate`).
    pub fn factor(self, step: u64, warmup: u64, total: u64, min_ratio: f64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let since = (step - warmup) as f64;
        let progress = (since / total.saturating_sub(warmup).max(1) as f64).min(1.0);
        let above = |factor: f64| factor * (1.0 - min_ratio) + min_ratio;
        match self {
            Self::Constant => 1.0,
            Self::Linear => above(1.0 - progress),
            Self::Cosine => above(0.5 * (1.0 + (PI * progress).cos())),
            Self::InverseSqrt => {
                let timescale = if warmup == 0 { TIMESCALE } else { warmup as f64 };
                1.0 / ((since + timescale) / timescale).sqrt()
            }
        }
    }

    /// Whether it falls to 0.
    pub(crate) fn ends_at_zero(self) -> bool {
        matches!(self, Self::Linear | Self::Cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [u64; 5] = [0, 1, 2, 6, 9];

    fn check(schedule: Schedule, warmup: u64, min_ratio: f64, want: [f64; 5]) {
        let got = STEPS.map(|step| schedule.factor(step, warmup, 10, min_ratio));
        for (got, want) in got.into_iter().zip(want) {
            assert!((got - want).abs() < 1e-15, "{schedule:?}: {got} {want}");
        }
    }

    /// Values of transformers 5.23.0 with a learning rate of 1, for 10 steps: `get_constant_schedule_with_warmup`,
    /// `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup` and `get_inverse_sqrt_schedule`; with a smallest
    /// rate, `get_cosine_with_min_lr_schedule_with_warmup` with `min_lr_rate` and `get_polynomial_decay_schedule_with_warmup`
    /// with `lr_end` and a power of 1.
    #[test]
    fn values_are_transformers() {
        use Schedule::{Constant, Cosine, InverseSqrt, Linear};
        check(Constant, 2, 0.0, [0.0, 0.5, 1.0, 1.0, 1.0]);
        check(Linear, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.125]);
        check(Cosine, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.038_060_233_744_356_63]);
        check(
            InverseSqrt,
            2,
            0.0,
            [0.0, 0.5, 1.0, 0.577_350_269_189_625_8, 0.471_404_520_791_031_73],
        );
        let late = [
            1.0,
            0.999_950_003_749_687_7,
            0.999_900_014_997_500_6,
            0.999_700_134_932_535_4,
            0.999_550_303_522_366_8,
        ];
        check(InverseSqrt, 0, 0.0, late);
        check(Cosine, 2, 0.1, [0.0, 0.5, 1.0, 0.55, 0.134_254_210_369_920_97]);
        check(Linear, 2, 0.1, [0.0, 0.5, 1.0, 0.55, 0.212_500_000_000_000_02]);
    }
}

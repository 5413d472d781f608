//! The exponentials of a softmax over a vocabulary and the tangents of its softcap: most of what a loss computes besides
//! products.

use num_traits::Float;

use crate::{DType, Element};

/// Values side by side: one instruction serves several of them where the processor can.
const LANES: usize = 16;
/// Values that are summed in their own type, before `f64` takes over: in each lane only as many as there are lanes.
const BLOCK: usize = LANES * LANES;

/// Replaces each `x` by `exp(x - shift)` and returns their sum.
pub(super) fn replace_by_exp<C: Float + Element>(values: &mut [C], shift: C) -> f64 {
    values
        .chunks_mut(BLOCK)
        .map(|block| {
            block.iter_mut().for_each(|x| *x = exp(*x - shift));
            sum(block)
        })
        .sum()
}

/// Replaces each `x` by `exp(x - shift) * slope(x)` and returns the sum of the exponentials.
pub(super) fn weigh_by_exp<C: Float + Element>(values: &mut [C], shift: C, slope: impl Fn(C) -> C) -> f64 {
    let mut block = [C::zero(); BLOCK];
    values
        .chunks_mut(BLOCK)
        .map(|values| {
            let block = &mut block[..values.len()];
            block.iter_mut().zip(values).for_each(|(to, x)| {
                *to = exp(*x - shift);
                *x = *to * slope(*x);
            });
            sum(block)
        })
        .sum()
}

/// The sum of `exp(x - shift)`.
pub(super) fn sum_of_exp<C: Float + Element>(values: &[C], shift: C) -> f64 {
    let mut block = [C::zero(); BLOCK];
    values
        .chunks(BLOCK)
        .map(|values| {
            let block = &mut block[..values.len()];
            block
                .iter_mut()
                .zip(values)
                .for_each(|(to, x)| *to = exp(*x - shift));
            sum(block)
        })
        .sum()
}

fn sum<C: Float + Element>(block: &[C]) -> f64 {
    let mut lanes = [C::zero(); LANES];
    for values in block.chunks(LANES) {
        lanes
            .iter_mut()
            .zip(values)
            .for_each(|(lane, x)| *lane = *lane + *x);
    }
    lanes.into_iter().map(Element::to_f64).sum()
}

/// `e^x`: in `f32` by the polynomial below, for which compilers use vectors, unlike for the system's function.
#[inline]
pub(super) fn exp<C: Float + Element>(x: C) -> C {
    if C::DTYPE == DType::F32 {
        C::from_f32(exp_f32(x.to_f32()))
    } else {
        x.exp()
    }
}

/// `tanh(x)`: in `f32` from the exponential above, and by a polynomial near 0, without branches.
#[inline]
pub(super) fn tanh<C: Float + Element>(x: C) -> C {
    if C::DTYPE == DType::F32 {
        C::from_f32(tanh_f32(x.to_f32()))
    } else {
        x.tanh()
    }
}

/// `tanh(x)` within three units in the last place (Moshier's Cephes, `tanhf.c`): of the magnitude, `1 - 2 / (e^(2x) + 1)`,
/// and below 0.625 `x + x^3 * p(x^2)`.
#[inline]
#[expect(clippy::excessive_precision, reason = "the constants are those of the source")]
fn tanh_f32(x: f32) -> f32 {
    const SMALL: f32 = 0.625;
    let magnitude = x.abs();
    let square = x * x;
    let polynomial = -5.704_988_727_45e-3;
    let polynomial = polynomial * square + 2.063_908_879_54e-2;
    let polynomial = polynomial * square - 5.373_971_555_31e-2;
    let polynomial = polynomial * square + 1.333_144_220_36e-1;
    let polynomial = polynomial * square - 3.333_328_194_22e-1;
    let small = polynomial * square * magnitude + magnitude;
    let large = 1.0 - 2.0 / (exp_f32(magnitude + magnitude) + 1.0);
    let of_magnitude = if magnitude < SMALL { small } else { large };
    of_magnitude.copysign(x)
}

/// `e^x` within two units in the last place (Moshier's Cephes, `expf.c`): `2^n * e^r` for a whole `n` and `|r| <= ln(2) / 2`.
/// Results below the least normal number are 0; above 88.376 results no longer grow, which a softmax never sees.
#[inline]
#[expect(clippy::excessive_precision, reason = "the constants are those of the source")]
fn exp_f32(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_544;
    const HIGHEST: f32 = 88.376_26;
    /// Added to a small number, it leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_40e-4;
    // A NaN passes both comparisons as it is.
    let inside = if x < LOWEST { LOWEST } else { x };
    let inside = if inside > HIGHEST { HIGHEST } else { inside };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN2_HIGH - n * LN2_LOW;
    let polynomial = 1.987_569_15e-4;
    let polynomial = polynomial * r + 1.398_199_950_7e-3;
    let polynomial = polynomial * r + 8.333_451_907_3e-3;
    let polynomial = polynomial * r + 4.166_579_589_4e-2;
    let polynomial = polynomial * r + 1.666_666_545_9e-1;
    let polynomial = polynomial * r + 5.000_000_120_1e-1;
    let power = polynomial * r * r + r + 1.0;
    // `n` lies between -126 and 127.
    let result = power * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOWEST { 0.0 } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_definition() {
        let mut x = -87.3f32;
        while x < 88.37 {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2.4e-7, "{x}: {got} {want}");
            x += 0.000_7 * x.abs().max(0.1);
            x += 1e-4;
        }
        assert_eq!(exp(0.0f32), 1.0);
        assert_eq!(exp(-0.0f32), 1.0);
        assert_eq!((exp(-1e3f32), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1e3f32) > 2.4e38 && exp(f32::INFINITY) > 2.4e38);
        assert_eq!(exp(1.0f64), 1f64.exp());
    }

    #[test]
    fn tangents_are_those_of_the_definition() {
        let mut x = 1e-30f32;
        while x < 100.0 {
            let (got, want) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!((got / want - 1.0).abs() < 3.6e-7, "{x}: {got} {want}");
            assert_eq!(tanh(-x), -tanh(x));
            x *= 1.000_3;
        }
        assert_eq!(tanh(0.0f32).to_bits(), 0.0f32.to_bits());
        assert_eq!(tanh(-0.0f32).to_bits(), (-0.0f32).to_bits());
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
        assert_eq!(tanh(1.0f64), 1f64.tanh());
    }

    #[test]
    fn sums_are_exact_to_the_type() {
        for len in [0, 1, 15, 16, 255, 256, 257, 100_000] {
            let value = |i: usize| <f32 as Element>::from_f64((i % 1000) as f64 / -100.0);
            let values: Vec<f32> = (0..len).map(value).collect();
            let want: f64 = values.iter().map(|x| f64::from(*x - 0.5).exp()).sum();
            let got = sum_of_exp(&values, 0.5);
            assert!((got - want).abs() <= 1e-7 * want, "{len}: {got} {want}");
            let mut replaced = values.clone();
            assert_eq!(replace_by_exp(&mut replaced, 0.5), got);
            let mut each = replaced.iter().zip(&values);
            assert!(each.all(|(got, x)| *got == exp(*x - 0.5)));
            let mut weighed = values.clone();
            assert_eq!(weigh_by_exp(&mut weighed, 0.5, |x| x), got);
            let mut each = weighed.iter().zip(replaced.iter().zip(&values));
            assert!(each.all(|(got, (exp, x))| *got == exp * x));
        }
    }
}

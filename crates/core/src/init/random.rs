//! Normal numbers, the same on every machine.
//!
//! A seed is part of an adapter's description: the bits that it stands for must not change with a crate's release,
//! a platform's libm or the framework. So they are defined here (and in SPEC.md, for ports) by integer arithmetic and
//! the operations that IEEE 754 rounds exactly: `SplitMix64` (Steele, Lea, Flood, "Fast splittable pseudorandom number
//! generators", OOPSLA 2014), Marsaglia's polar method, and a logarithm of its own. No crate promises bits of normal
//! numbers: `rand_distr` calls the platform's logarithm too.

use crate::TokenId;

/// What a stream of numbers is for: no two uses share one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The row itself: its elements, or its weights on the table's rows.
    Row,
    /// The modifier of this place.
    Noise(u64),
}

/// A stream of standard normal numbers.
#[derive(Clone, Debug)]
pub(super) struct Normals {
    state: u64,
    second: Option<f64>,
}

impl Normals {
    /// The stream of a seed, a token and a purpose.
    pub(super) fn new(seed: u64, id: TokenId, purpose: Purpose) -> Self {
        let purpose = match purpose {
            Purpose::Row => 0,
            Purpose::Noise(at) => at.wrapping_add(1),
        };
        let stream = purpose << 32 | u64::from(id.0);
        Self {
            state: mix(mix(seed).wrapping_add(stream)),
            second: None,
        }
    }

    /// The next number, by the polar method: two at a time from a point in the unit disc.
    pub(super) fn draw(&mut self) -> f64 {
        if let Some(second) = self.second.take() {
            return second;
        }
        loop {
            let (x, y) = (self.coordinate(), self.coordinate());
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                let factor = (-2.0 * ln(square) / square).sqrt();
                self.second = Some(y * factor);
                return x * factor;
            }
        }
    }

    /// A multiple of `2^-52` from -1 and below 1.
    fn coordinate(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.state) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// `SplitMix64`'s output function.
fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The natural logarithm of a normal number above 0, within 4 units in the last place of the result or of 1e-2,
/// whichever is larger: `x = m * 2^e` with `m` around 1, and `ln m = 2 artanh((m - 1) / (m + 1))` by its series.
fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let exponent = i32::try_from(bits >> 52).unwrap_or_default() - 1023;
    let (mut m, mut e) = (f64::from_bits(bits & MANTISSA | 1023 << 52), f64::from(exponent));
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        e += 1.0;
    }
    let t = (m - 1.0) / (m + 1.0);
    let square = t * t;
    // 1 + t^2/3 + t^4/5 + …; with |t| below 0.172 the first term left out is below 1e-17.
    let series = (0..=10u8)
        .rev()
        .fold(0.0, |sum, n| sum * square + 1.0 / f64::from(2 * n + 1));
    e * std::f64::consts::LN_2 + 2.0 * t * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix64_has_its_published_values() {
        // https://prng.di.unimi.it/splitmix64.c, seeded with 1234567.
        let mut state = 1_234_567u64;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        };
        assert_eq!(
            [next(), next(), next()],
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn the_logarithm_is_one() {
        let mut worst: f64 = 0.0;
        for step in 1..200_000u32 {
            for x in [
                f64::from(step) / 200_000.0,
                0.97f64.powi(i32::try_from(step % 20_000).unwrap()),
            ] {
                if x.is_normal() {
                    worst = worst.max((ln(x) - x.ln()).abs() / x.ln().abs().max(1e-2));
                }
            }
        }
        assert!(worst < 4.0 * f64::EPSILON, "{worst}");
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn values_are_stable() {
        // Computed by a few lines of Python after SPEC.md.
        let drawn = |purpose| {
            let mut normals = Normals::new(7, TokenId(3), purpose);
            [(); 4].map(|()| normals.draw().to_bits())
        };
        assert_eq!(
            drawn(Purpose::Row),
            [
                0x3fe6_2f5e_4a82_b349,
                0xbfe3_763d_2b87_256b,
                0xbfe2_212e_d21c_8749,
                0xbff3_ffbc_1d5e_3c0f
            ]
        );
        assert_eq!(
            drawn(Purpose::Noise(1)),
            [
                0x3fa2_1dc7_e3cb_0b57,
                0xbfc3_e89d_f615_89c0,
                0xc007_0041_ee5c_11b7,
                0x4000_9d1c_5184_62cc
            ]
        );
    }

    #[test]
    fn streams_are_standard_normal_and_independent() {
        // Of 2^17 numbers each; the bounds are five standard errors.
        let count = 1 << 17;
        let stream = |seed, id, purpose| {
            let mut normals = Normals::new(seed, TokenId(id), purpose);
            (0..count).map(|_| normals.draw()).collect::<Vec<f64>>()
        };
        let streams = [
            stream(0, 0, Purpose::Row),
            stream(1, 0, Purpose::Row),
            stream(0, 1, Purpose::Row),
            stream(0, 0, Purpose::Noise(0)),
            stream(0, 0, Purpose::Noise(1)),
            stream(u64::MAX, u32::MAX, Purpose::Row),
        ];
        let n = f64::from(count);
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
        for (at, one) in streams.iter().enumerate() {
            // Variances of the moments: 1, 2, 15, 96.
            for (power, (want, variance)) in (1..).zip([(0.0, 1.0), (1.0, 2.0), (0.0, 15.0), (3.0, 96.0f64)])
            {
                let got = mean(&mut one.iter().map(|x| x.powi(power)));
                assert!(
                    (got - want).abs() < 5.0 * (variance / n).sqrt(),
                    "stream {at}, moment {power}: {got}"
                );
            }
            let tail = mean(&mut one.iter().map(|x| f64::from(u8::from(x.abs() > 2.0))));
            assert!(
                (tail - 0.045_500).abs() < 5.0 * (0.0455 / n).sqrt(),
                "stream {at}: {tail}"
            );
            let neighbours = mean(&mut one.windows(2).map(|pair| pair[0] * pair[1]));
            assert!(neighbours.abs() < 5.0 / n.sqrt(), "stream {at}: {neighbours}");
            for (other_at, other) in streams.iter().enumerate().skip(at + 1) {
                let product = mean(&mut one.iter().zip(other).map(|(x, y)| x * y));
                assert!(
                    product.abs() < 5.0 / n.sqrt(),
                    "streams {at} and {other_at}: {product}"
                );
            }
        }
    }
}

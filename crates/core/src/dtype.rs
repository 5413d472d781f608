//! Element types of tables and rows.

use std::fmt::{self, Debug};

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use num_traits::{Float, NumAssign};

use crate::{RowData, RowRef};

/// An element type of a table or of trained rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an `f32`.
    BF16,
}

impl DType {
    /// Bytes per element.
    pub const fn size_in_bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The element type in which rows of a table of this type train by default: at least `f32`, and never less
    /// than the table's own, so that a copied row is exact (PEFT's `autocast_adapter_dtype=True`).
    pub const fn default_row_dtype(self) -> Self {
        match self {
            Self::F64 => Self::F64,
            Self::F32 | Self::F16 | Self::BF16 => Self::F32,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        })
    }
}

/// A Rust type that a table or rows can hold.
///
/// # Contract
///
/// 1. Conversion to `Compute` is exact; conversion from it rounds to nearest, ties to even. From `f64` to half
///    precision it rounds twice, by way of `f32`, as torch does (`c10/util/Half.h`, `BFloat16.h`).
/// 2. `to_le_bytes` and `from_le_bytes` keep every bit, of NaNs too.
pub trait Element: Copy + Default + PartialEq + Debug + Send + Sync + 'static {
    /// The type that arithmetic on the element runs in (`f32` for half precision, as in torch).
    type Compute: Float + NumAssign + Element<Compute = Self::Compute> + Debug;
    /// The type's tag.
    const DTYPE: DType;

    /// Widens exactly.
    fn to_compute(self) -> Self::Compute;
    /// Rounds to nearest even.
    fn from_compute(value: Self::Compute) -> Self;
    /// Widens exactly.
    fn to_f64(self) -> f64;
    /// Rounds to nearest even, by way of `f32` for half precision.
    fn from_f64(value: f64) -> Self;
    /// Converts to `f32` (exact unless the type is `f64`).
    fn to_f32(self) -> f32;
    /// Rounds to nearest even (exact unless the type is half precision).
    fn from_f32(value: f32) -> Self;
    /// [`to_compute`](Self::to_compute) of every element, by the processor's own conversion where it has one; the shorter of
    /// the two slices counts.
    fn to_compute_slice(values: &[Self], out: &mut [Self::Compute]) {
        out.iter_mut()
            .zip(values)
            .for_each(|(out, value)| *out = value.to_compute());
    }
    /// [`from_compute`](Self::from_compute) of every element, as [`to_compute_slice`](Self::to_compute_slice).
    fn from_compute_slice(values: &[Self::Compute], out: &mut [Self]) {
        out.iter_mut()
            .zip(values)
            .for_each(|(out, value)| *out = Self::from_compute(*value));
    }
    /// Zeros that the system gives as it gives all new memory, so that nothing is touched before it is written.
    fn zeros(len: usize) -> Vec<Self> {
        vec![Self::default(); len]
    }
    /// Reads one element from exactly `size_in_bytes` little-endian bytes; other lengths give the default.
    fn from_le_bytes(bytes: &[u8]) -> Self;
    /// Appends the element's little-endian bytes.
    fn extend_le_bytes(self, out: &mut Vec<u8>);
    /// Tags a row of the type.
    fn row_ref(row: &[Self]) -> RowRef<'_>;
    /// Borrows a table's row as it is, if it is of the type and aligned in memory.
    fn borrow_row(row: RowRef<'_>) -> Option<&[Self]>;
    /// Wraps a vector of the type.
    fn into_data(values: Vec<Self>) -> RowData;
    /// Borrows the vector of the type, if it is of the type.
    fn data(data: &RowData) -> Option<&[Self]>;
    /// Mutably borrows the vector of the type, if it is of the type.
    fn data_mut(data: &mut RowData) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($ty:ty, $tag:ident, $compute:ty, to: $to:expr, from: $from:expr, to64: $to64:expr, from64: $from64:expr, to32: $to32:expr, from32: $from32:expr $(, $slices:ident)?) => {
        impl Element for $ty {
            type Compute = $compute;
            const DTYPE: DType = DType::$tag;

            #[inline]
            fn to_compute(self) -> $compute {
                $to(self)
            }
            #[inline]
            fn from_compute(value: $compute) -> Self {
                $from(value)
            }
            #[inline]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline]
            fn from_f64(value: f64) -> Self {
                $from64(value)
            }
            #[inline]
            fn to_f32(self) -> f32 {
                $to32(self)
            }
            #[inline]
            fn from_f32(value: f32) -> Self {
                $from32(value)
            }
            #[inline]
            fn from_le_bytes(bytes: &[u8]) -> Self {
                bytes
                    .try_into()
                    .map_or_else(|_| Self::default(), <$ty>::from_le_bytes)
            }
            fn extend_le_bytes(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            #[inline]
            fn row_ref(row: &[Self]) -> RowRef<'_> {
                RowRef::$tag(row)
            }
            #[inline]
            fn borrow_row(row: RowRef<'_>) -> Option<&[Self]> {
                match row {
                    RowRef::$tag(values) => Some(values),
                    _ => None,
                }
            }
            $($slices!();)?
            fn into_data(values: Vec<Self>) -> RowData {
                RowData::$tag(values)
            }
            fn data(data: &RowData) -> Option<&[Self]> {
                match data {
                    RowData::$tag(values) => Some(values),
                    _ => None,
                }
            }
            fn data_mut(data: &mut RowData) -> Option<&mut [Self]> {
                match data {
                    RowData::$tag(values) => Some(values),
                    _ => None,
                }
            }
        }
    };
}

/// Zeros of a type of half precision.
macro_rules! half_zeros {
    () => {
        fn zeros(len: usize) -> Vec<Self> {
            vec![0u16; len].reinterpret_into()
        }
    };
}

/// Conversions of slices by the processor's own instructions, which `half` finds.
macro_rules! f16_slices {
    () => {
        half_zeros!();
        fn to_compute_slice(values: &[Self], out: &mut [f32]) {
            let len = values.len().min(out.len());
            values[..len].convert_to_f32_slice(&mut out[..len]);
        }
        fn from_compute_slice(values: &[f32], out: &mut [Self]) {
            let len = values.len().min(out.len());
            out[..len].convert_from_f32_slice(&values[..len]);
        }
    };
}

/// Conversions of slices without a branch, so that vectors do them; `half` goes element by element.
macro_rules! bf16_slices {
    () => {
        half_zeros!();
        fn to_compute_slice(values: &[Self], out: &mut [f32]) {
            let each = out.iter_mut().zip(values);
            each.for_each(|(out, value)| *out = widen_bf16(*value));
        }
        fn from_compute_slice(values: &[f32], out: &mut [Self]) {
            let each = out.iter_mut().zip(values);
            each.for_each(|(out, value)| *out = narrow_bf16(*value));
        }
    };
}

/// [`bf16::to_f32`].
#[inline]
fn widen_bf16(value: bf16) -> f32 {
    let bits = u32::from(value.to_bits());
    let quiet = if bits & 0x7fff > 0x7f80 { bits | 0x40 } else { bits };
    f32::from_bits(quiet << 16)
}

/// [`bf16::from_f32`]: to nearest even; a NaN stays one, and becomes quiet.
#[inline]
fn narrow_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    let bits = if is_nan { bits | 0x0040_0000 } else { rounded };
    bf16::from_bits((bits >> 16) as u16)
}

// The narrowing `as` casts below round to nearest even by the language's definition.
#[allow(clippy::cast_possible_truncation)]
fn narrow(value: f64) -> f32 {
    value as f32
}

element!(f64, F64, f64, to: |x| x, from: |x| x, to64: |x| x, from64: |x| x, to32: narrow, from32: f64::from);
element!(f32, F32, f32, to: |x| x, from: |x| x, to64: f64::from, from64: narrow, to32: |x| x, from32: |x| x);
element!(f16, F16, f32, to: f16::to_f32, from: f16::from_f32, to64: f16::to_f64, from64: |x| f16::from_f32(narrow(x)), to32: f16::to_f32, from32: f16::from_f32, f16_slices);
element!(bf16, BF16, f32, to: bf16::to_f32, from: bf16::from_f32, to64: bf16::to_f64, from64: |x| bf16::from_f32(narrow(x)), to32: bf16::to_f32, from32: bf16::from_f32, bf16_slices);

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trips<T: Element>() {
        for value in [-0.0, 0.0, 1.5, -2.25, f64::INFINITY, 65504.0] {
            let element = T::from_f64(value);
            let mut bytes = Vec::new();
            element.extend_le_bytes(&mut bytes);
            assert_eq!(bytes.len(), T::DTYPE.size_in_bytes());
            assert_eq!(
                T::from_le_bytes(&bytes).to_f64().to_bits(),
                element.to_f64().to_bits()
            );
            assert_eq!(T::from_compute(element.to_compute()), element);
        }
    }

    #[test]
    fn every_type_round_trips() {
        round_trips::<f64>();
        round_trips::<f32>();
        round_trips::<f16>();
        round_trips::<bf16>();
    }

    /// A slice of a length that no vector register divides, through every kind of number.
    fn slices_convert_as_their_elements_do<T: Element>() {
        let numbers: Vec<f32> = (0u8..77)
            .map(|at| (f32::from(at) - 38.0) * 1.1f32.powi(i32::from(at) * 3))
            .chain([f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40, -0.0])
            .collect();
        let elements: Vec<T> = numbers.iter().map(|x| T::from_f32(*x)).collect();
        let mut wide = vec![T::Compute::default(); elements.len()];
        T::to_compute_slice(&elements, &mut wide);
        let want: Vec<_> = elements.iter().map(|x| x.to_compute()).collect();
        assert_eq!(wide, want);
        let numbers: Vec<T::Compute> = numbers.iter().map(|x| T::Compute::from_f32(*x)).collect();
        let mut narrow = vec![T::default(); numbers.len()];
        T::from_compute_slice(&numbers, &mut narrow);
        let want: Vec<_> = numbers.iter().map(|x| T::from_compute(*x)).collect();
        assert_eq!(narrow, want);
        T::to_compute_slice(&elements, &mut wide[..3]);
        T::from_compute_slice(&numbers[..3], &mut narrow);
    }

    #[test]
    fn slices_of_every_type_convert() {
        slices_convert_as_their_elements_do::<f64>();
        slices_convert_as_their_elements_do::<f32>();
        slices_convert_as_their_elements_do::<f16>();
        slices_convert_as_their_elements_do::<bf16>();
    }

    #[test]
    fn bf16_has_the_bits_of_half() {
        for bits in 0..=u16::MAX {
            let value = bf16::from_bits(bits);
            let wide = value.to_f32().to_bits();
            assert_eq!(widen_bf16(value).to_bits(), wide, "{bits:#x}");
            // Below, at and above the middle, and NaN whose payload is in the lower half alone.
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(bits) << 16 | low);
                let want = bf16::from_f32(value).to_bits();
                assert_eq!(narrow_bf16(value).to_bits(), want, "{bits:#x} {low:#x}");
            }
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        assert_eq!(bf16::from_f32(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80);
        assert_eq!(bf16::from_f32(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82);
        assert_eq!(<bf16 as Element>::from_f32(3.4e38), bf16::INFINITY);
    }

    #[test]
    fn narrowing_from_f64_goes_through_f32() {
        // Just above the middle of two neighbours, but for f32 in the middle: the even one, as in torch.
        assert_eq!(
            <bf16 as Element>::from_f64(1.0 + 2f64.powi(-8) + 2f64.powi(-40)).to_bits(),
            0x3f80
        );
        assert_eq!(
            <f16 as Element>::from_f64(1.0 + 2f64.powi(-11) + 2f64.powi(-40)).to_bits(),
            0x3c00
        );
        assert_eq!(
            <f16 as Element>::from_f64(1.0 + 3.0 * 2f64.powi(-11)).to_bits(),
            0x3c02
        );
    }
}

//! Gradients that do not follow from how a value was computed.
//!
//! Burn lets no crate outside of it add a backward pass for all of its devices. What is needed here can be had from the
//! operations that it has: a term that is zero, but whose derivative is not.

use burn::tensor::{Tensor, TensorData};

/// What a gradient is multiplied by on its way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Factor<'a> {
    /// The same number everywhere.
    All(f64),
    /// A number for each row, and one for all, which has the sign.
    Rows(&'a [f64], f64),
}

/// A term of the shape of `x` that leaves every bit of a number it is added to as it was, and whose derivative with respect
/// to `x` is `factor`.
///
/// The term is `-0.0`, the one number `z` with `v + z = v` for all `v`, negative zero among them. (A sum with a
/// NaN is a NaN.) Where `x` is not finite no difference of it is zero; there the term is `x * factor`, and what it is
/// added to must be the same infinity or a NaN, as is every result of an infinite `x` in this crate.
pub(super) fn zero_with_gradient(x: Tensor<2>, factor: Factor<'_>) -> Tensor<2> {
    let value = x.clone().detach();
    let infinite = value.clone().is_finite().bool_not();
    let value = value.mask_fill(infinite, 0.0);
    let sign = match factor {
        Factor::All(factor) | Factor::Rows(_, factor) => factor,
    };
    // A difference of equals is +0.0, and -0.0 once it is multiplied by a number below zero.
    let zero = if sign < 0.0 { x - value } else { value - x };
    match factor {
        Factor::All(factor) => zero.mul_scalar(-factor.abs()),
        Factor::Rows(rows, factor) => {
            let (device, dtype) = (zero.device(), zero.dtype());
            let rows: Vec<f64> = rows.iter().map(|row| -(row * factor).abs()).collect();
            let shape = [rows.len(), 1];
            zero * Tensor::from_data(TensorData::new(rows, shape), (&device, dtype))
        }
    }
}

//! Nonlinearities of feed-forward layers, with and without a gate.

use std::f64::consts::FRAC_1_SQRT_2;

use candle_core::cpu::erf::erf_f64;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use num_traits::Zero;
use trainable_tokens_core::Element;

use super::parallel;
use super::storage::{Number, Real, elements, for_dtype, real, with_elements};
use crate::config::Activation;

/// `activation(gate) * up` (Shazeer 2020), for tensors of one shape.
pub(crate) fn gate(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return composed(activation, gate)? * up;
    }
    if gate.shape() != up.shape() {
        let (gate, up) = (gate.shape(), up.shape());
        candle_core::bail!("a gate of shape {gate:?} does not fit {up:?}");
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, OnCpu(activation))
}

/// `activation(x)`.
pub(crate) fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed(activation, x);
    }
    x.contiguous()?.apply_op1(OnCpu(activation))
}

/// The nonlinearity, composed of candle's operations. Its own GELU has a rounded constant in its gradient.
pub(super) fn composed(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x * x.affine(FRAC_1_SQRT_2, 0.0)?.erf()?.affine(0.5, 0.5)?,
        Activation::Relu => x.relu(),
        Activation::GeluTanh => {
            let inner = (x + (x.sqr()? * x)?.affine(CUBIC, 0.0)?)?.affine(SLOPE, 0.0)?;
            x * inner.tanh()?.affine(0.5, 0.5)?
        }
    }
}

/// `sqrt(2 / pi)`.
const SLOPE: f64 = 0.797_884_560_802_865_4;
/// That of the normal distribution: `1 / sqrt(2 pi)`.
const DENSITY_AT_0: f64 = 0.398_942_280_401_432_7;
/// What the cube adds in the argument of GELU's hyperbolic tangent.
const CUBIC: f64 = 0.044_715;

/// The value of a nonlinearity at `x`, and its slope there.
#[inline]
fn value_and_slope<C: Real>(activation: Activation, x: C) -> [C; 2] {
    match activation {
        Activation::Silu => {
            let sigmoid = (C::one() + (-x).exp()).recip();
            [x * sigmoid, sigmoid * (C::one() + x * (C::one() - sigmoid))]
        }
        Activation::Gelu => {
            let wide = Element::to_f64(x);
            let below = 0.5 * (1.0 + erf_f64(wide * FRAC_1_SQRT_2));
            let density = DENSITY_AT_0 * (-0.5 * wide * wide).exp();
            [real(wide * below), real(below + wide * density)]
        }
        Activation::Relu => [x.max(C::zero()), if x > C::zero() { C::one() } else { C::zero() }],
        Activation::GeluTanh => {
            let (half, cubic, slope): (C, C, C) = (real(0.5), real(CUBIC), real(SLOPE));
            let square = x * x;
            let tanh = (slope * x * (C::one() + cubic * square)).tanh();
            let outer = half * (C::one() + tanh);
            let inner = slope * (C::one() + real::<C>(3.0) * cubic * square);
            [x * outer, outer + half * x * (C::one() - tanh * tanh) * inner]
        }
    }
}

/// A nonlinearity as one operation, for the CPU.
struct OnCpu(Activation);

/// Without a gate.
impl CustomOp1 for OnCpu {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let out = for_dtype!(x.dtype(), T => {
            let x = elements::<T>(x, layout)?;
            let value = |[x]: [&T; 1]| T::from_compute(value_and_slope(self.0, x.to_compute())[0]);
            T::to_cpu_storage_owned(map([x], value))
        });
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let gradient = for_dtype!(x.dtype(), T => {
            let gradient = with_elements::<T, _>(x, |x| {
                with_elements::<T, _>(upstream, |upstream| {
                    Ok(map([x, upstream], |[x, upstream]| {
                        let [_, slope] = value_and_slope(self.0, x.to_compute());
                        T::from_compute(upstream.to_compute() * slope)
                    }))
                })
            })?;
            Tensor::from_vec(gradient, x.shape(), x.device())?
        });
        Ok(Some(gradient))
    }
}

/// With a gate. The nonlinearity is rounded before it is multiplied, as in transformers.
impl CustomOp2 for OnCpu {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let out = for_dtype!(gate.dtype(), T => {
            let (gate, up) = (elements::<T>(gate, gate_layout)?, elements::<T>(up, up_layout)?);
            T::to_cpu_storage_owned(map([gate, up], |[gate, up]| {
                let [value, _] = value_and_slope(self.0, gate.to_compute());
                T::from_compute(T::from_compute(value).to_compute() * up.to_compute())
            }))
        });
        Ok((out, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let tensors = for_dtype!(gate.dtype(), T => {
            let gradients = with_elements::<T, _>(gate, |gate| {
                with_elements::<T, _>(up, |up| {
                    with_elements::<T, _>(upstream, |upstream| Ok(backward(self.0, gate, up, upstream)))
                })
            })?;
            gradients.map(|gradient| Tensor::from_vec(gradient, gate.shape(), gate.device()))
        });
        let [gate, up] = tensors;
        Ok((Some(gate?), Some(up?)))
    }
}

/// `f` of the elements at each place of equally long operands.
fn map<T: Number, const N: usize>(operands: [&[T]; N], f: impl Fn([&T; N]) -> T + Sync) -> Vec<T> {
    let length = operands.first().map_or(0, |operand| operand.len());
    let mut out = vec![<T as Zero>::zero(); length];
    let share = parallel::share(length, 1);
    let f = &f;
    parallel::run(out.chunks_mut(share).enumerate().map(|(job, out)| {
        let operands = operands.map(|operand| &operand[job * share..][..out.len()]);
        move || {
            for (at, out) in out.iter_mut().enumerate() {
                *out = f(operands.map(|operand| &operand[at]));
            }
        }
    }));
    out
}

/// The gradients of the gate and of what it gates.
fn backward<T: Number>(activation: Activation, gate: &[T], up: &[T], upstream: &[T]) -> [Vec<T>; 2] {
    let mut gradients = [
        vec![<T as Zero>::zero(); gate.len()],
        vec![<T as Zero>::zero(); up.len()],
    ];
    let share = parallel::share(gate.len(), 1);
    let [of_gate, of_up] = &mut gradients;
    let out = of_gate.chunks_mut(share).zip(of_up.chunks_mut(share));
    let parts = out
        .zip(gate.chunks(share))
        .zip(up.chunks(share))
        .zip(upstream.chunks(share));
    parallel::run(parts.map(|((((of_gate, of_up), gate), up), upstream)| {
        move || {
            let out = of_gate.iter_mut().zip(of_up);
            for (((out, gate), up), upstream) in out.zip(gate).zip(up).zip(upstream) {
                let (up, upstream) = (up.to_compute(), upstream.to_compute());
                let [value, slope] = value_and_slope(activation, gate.to_compute());
                *out.0 = T::from_compute(upstream * up * slope);
                *out.1 = T::from_compute(upstream * value);
            }
        }
    }));
    gradients
}

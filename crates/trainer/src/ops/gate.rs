//! The gate of a gated feed-forward layer.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use num_traits::{Float, One, Zero};

use super::parallel;
use super::storage::{Number, elements, for_dtype, with_elements};

/// `silu(gate) * up` (Shazeer 2020), for tensors of one shape.
pub(crate) fn silu_gate(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return composed(gate, up);
    }
    if gate.shape() != up.shape() {
        let (gate, up) = (gate.shape(), up.shape());
        candle_core::bail!("a gate of shape {gate:?} does not fit {up:?}");
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SiluGate)
}

/// The gate, composed of candle's operations.
pub(super) fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// The gate as one operation, for the CPU.
struct SiluGate;

impl CustomOp2 for SiluGate {
    fn name(&self) -> &'static str {
        "silu-gate"
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
            let out = forward::<T>(elements(gate, gate_layout)?, elements(up, up_layout)?);
            T::to_cpu_storage_owned(out)
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
            let gradients = with_elements(gate, |gate| {
                with_elements(up, |up| with_elements(upstream, |upstream| Ok(backward::<T>(gate, up, upstream))))
            })?;
            gradients.map(|gradient| Tensor::from_vec(gradient, gate.shape(), gate.device()))
        });
        let [gate, up] = tensors;
        Ok((Some(gate?), Some(up?)))
    }
}

fn sigmoid<C: Float>(x: C) -> C {
    (C::one() + (-x).exp()).recip()
}

fn forward<T: Number>(gate: &[T], up: &[T]) -> Vec<T> {
    let mut out = vec![<T as Zero>::zero(); gate.len()];
    let share = parallel::share(gate.len(), 1);
    let parts = out
        .chunks_mut(share)
        .zip(gate.chunks(share))
        .zip(up.chunks(share));
    parallel::run(parts.map(|((out, gate), up)| {
        move || {
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                let x = gate.to_compute();
                let silu = T::from_compute(x * sigmoid(x));
                *out = T::from_compute(silu.to_compute() * up.to_compute());
            }
        }
    }));
    out
}

/// The gradients of the gate and of what it gates.
fn backward<T: Number>(gate: &[T], up: &[T], upstream: &[T]) -> [Vec<T>; 2] {
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
                let (x, up, upstream) = (gate.to_compute(), up.to_compute(), upstream.to_compute());
                let sigmoid = sigmoid(x);
                let slope = sigmoid * (T::Compute::one() + x * (T::Compute::one() - sigmoid));
                *out.0 = T::from_compute(upstream * up * slope);
                *out.1 = T::from_compute(upstream * x * sigmoid);
            }
        }
    }));
    gradients
}

//! Root-mean-square norm.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, WithDType};
use num_traits::{Float, Zero};

use super::frozen::mul_frozen;
use super::storage::{Number, dot, elements, for_dtype, real, with_elements};
use super::{parallel, working_dtype};

/// Root-mean-square norm over the last dimension, in `f32`, with a frozen weight (Zhang and Sennrich 2019; rounding
/// as in transformers' `LlamaRMSNorm`).
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed(x, weight, eps);
    }
    x.contiguous()?.apply_op1(RmsNorm {
        weight: weight.detach(),
        eps,
    })
}

/// The norm, composed of candle's operations.
pub(super) fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(working_dtype(dtype))?;
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_mul(&(mean_square + eps)?.sqrt()?.recip()?)?;
    mul_frozen(&normed.to_dtype(dtype)?, weight)
}

/// The norm as one operation, for the CPU. Its backward pass computes the rows' scales again.
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = for_dtype!(self.weight.dtype(), T => with_elements(&self.weight, |weight| {
            Ok(T::to_cpu_storage_owned(forward::<T>(elements(x, layout)?, weight, self.eps)))
        })?);
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let gradient = for_dtype!(x.dtype(), T => {
            let gradient = with_elements(&self.weight, |weight| {
                with_elements(x, |x| with_elements(upstream, |up| Ok(backward::<T>(x, weight, up, self.eps))))
            })?;
            Tensor::from_vec(gradient, x.shape(), x.device())?
        });
        Ok(Some(gradient))
    }
}

/// Widens a row and returns its scale, `1 / sqrt(mean(x^2) + eps)`.
fn scale_of<T: Number>(x: &[T], wide: &mut [T::Compute], eps: f64) -> T::Compute {
    wide.iter_mut()
        .zip(x)
        .for_each(|(wide, x)| *wide = x.to_compute());
    let mean = dot(wide, wide) / real(x.len() as f64);
    (mean + real(eps)).sqrt().recip()
}

fn forward<T: Number>(x: &[T], weight: &[T], eps: f64) -> Vec<T> {
    let width = weight.len().max(1);
    let mut out = vec![<T as Zero>::zero(); x.len()];
    let share = parallel::share(x.len(), width);
    parallel::run(out.chunks_mut(share).zip(x.chunks(share)).map(|(out, x)| {
        move || {
            let mut wide = vec![<T::Compute as Zero>::zero(); width];
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let scale = scale_of(x, &mut wide, eps);
                for ((out, x), weight) in out.iter_mut().zip(&wide).zip(weight) {
                    let normed = T::from_compute(*x * scale);
                    *out = T::from_compute(normed.to_compute() * weight.to_compute());
                }
            }
        }
    }));
    out
}

/// `(g - x * scale^2 * mean(g * x)) * scale` for `g = upstream * weight`.
fn backward<T: Number>(x: &[T], weight: &[T], upstream: &[T], eps: f64) -> Vec<T> {
    let width = weight.len().max(1);
    let mut out = vec![<T as Zero>::zero(); x.len()];
    let share = parallel::share(x.len(), width);
    let parts = out
        .chunks_mut(share)
        .zip(x.chunks(share))
        .zip(upstream.chunks(share));
    parallel::run(parts.map(|((out, x), upstream)| {
        move || {
            let mut wide = vec![<T::Compute as Zero>::zero(); width];
            let mut weighted = wide.clone();
            let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((out, x), upstream) in rows.zip(upstream.chunks_exact(width)) {
                let scale = scale_of(x, &mut wide, eps);
                for ((g, upstream), weight) in weighted.iter_mut().zip(upstream).zip(weight) {
                    *g = upstream.to_compute() * weight.to_compute();
                }
                let along = dot(&weighted, &wide) / real(width as f64) * scale * scale;
                for ((out, x), g) in out.iter_mut().zip(&wide).zip(&weighted) {
                    *out = T::from_compute((*g - *x * along) * scale);
                }
            }
        }
    }));
    out
}

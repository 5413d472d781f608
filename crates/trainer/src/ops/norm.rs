//! Norms over the last dimension, with frozen weights.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, WithDType};
use num_traits::{Float, Zero};
use trainable_tokens_core::Element;

use super::frozen::{add_frozen, mul_frozen};
use super::storage::{Number, dot, elements, for_dtype, real, with_elements};
use super::{parallel, working_dtype};

/// What is done to each row `x`, in at least `f32`.
#[derive(Clone, Debug)]
pub(crate) enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019). The quotient is rounded to the weight's type, as
    /// transformers' `LlamaRMSNorm` does; Gemma's does not round it, so that its weight is in `f32`.
    RootMeanSquare {
        /// `[D]`.
        weight: Tensor,
        /// Keeps the root from 0.
        eps: f64,
    },
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (Ba et al. 2016).
    Layer {
        /// `[D]`.
        weight: Tensor,
        /// `[D]`.
        bias: Tensor,
        /// Keeps the root from 0.
        eps: f64,
    },
}

impl Norm {
    fn parts(&self) -> (&Tensor, Option<&Tensor>, f64) {
        match self {
            Self::RootMeanSquare { weight, eps } => (weight, None, *eps),
            Self::Layer { weight, bias, eps } => (weight, Some(bias), *eps),
        }
    }

    /// `[.., D]` to `[.., D]`, in the type of `x`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return self.composed(x);
        }
        let (weight, _, _) = self.parts();
        if x.dims().last() != Some(&weight.elem_count()) {
            candle_core::bail!(
                "a norm of width {} does not fit {:?}",
                weight.elem_count(),
                x.shape()
            );
        }
        x.contiguous()?.apply_op1(Normalize { norm: self.clone() })
    }

    /// The norm, composed of candle's operations.
    pub(super) fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let mut x = x.to_dtype(working_dtype(dtype))?;
        let (weight, bias, eps) = self.parts();
        if bias.is_some() {
            x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        }
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = x.broadcast_mul(&(mean_square + eps)?.sqrt()?.recip()?)?;
        match bias {
            None => mul_frozen(&normed.to_dtype(weight.dtype())?, weight)?.to_dtype(dtype),
            Some(bias) => {
                let wide = |tensor: &Tensor| tensor.to_dtype(normed.dtype());
                add_frozen(&mul_frozen(&normed, &wide(weight)?)?, &wide(bias)?)?.to_dtype(dtype)
            }
        }
    }
}

/// The norm as one operation, for the CPU. Its backward pass computes the rows' scales again.
struct Normalize {
    norm: Norm,
}

impl CustomOp1 for Normalize {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let out = for_dtype!(x.dtype(), T => {
            T::to_cpu_storage_owned(Rows::<T>::new(&self.norm)?.forward(elements(x, layout)?))
        });
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let gradient = for_dtype!(x.dtype(), T => {
            let rows = Rows::<T>::new(&self.norm)?;
            let gradient = with_elements(x, |x| with_elements(upstream, |up| Ok(rows.backward(x, up))))?;
            Tensor::from_vec(gradient, x.shape(), x.device())?
        });
        Ok(Some(gradient))
    }
}

/// A norm's numbers in the type that rows of `T` are computed in.
struct Rows<T: Number> {
    weight: Vec<T::Compute>,
    bias: Option<Vec<T::Compute>>,
    eps: T::Compute,
    /// Whether quotients are rounded before they are multiplied by the weight.
    rounds: bool,
}

impl<T: Number> Rows<T> {
    fn new(norm: &Norm) -> Result<Self> {
        let (weight, bias, eps) = norm.parts();
        Ok(Self {
            weight: wide::<T>(weight)?,
            bias: bias.map(wide::<T>).transpose()?,
            eps: real(eps),
            rounds: bias.is_none() && weight.dtype() == <T as WithDType>::DTYPE,
        })
    }

    fn width(&self) -> usize {
        self.weight.len().max(1)
    }

    /// Widens a row, less its mean where the norm takes it off, and returns its scale, `1 / sqrt(mean(x^2) + eps)`.
    fn scale_of(&self, x: &[T], wide: &mut [T::Compute]) -> T::Compute {
        wide.iter_mut()
            .zip(x)
            .for_each(|(wide, x)| *wide = x.to_compute());
        if self.bias.is_some() {
            take_off_mean(wide);
        }
        let mean = dot(wide, wide) / real(x.len() as f64);
        (mean + self.eps).sqrt().recip()
    }

    fn forward(&self, x: &[T]) -> Vec<T> {
        let width = self.width();
        let mut out = vec![<T as Zero>::zero(); x.len()];
        let share = parallel::share(x.len(), width);
        parallel::run(out.chunks_mut(share).zip(x.chunks(share)).map(|(out, x)| {
            move || {
                let mut wide = vec![<T::Compute as Zero>::zero(); width];
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let scale = self.scale_of(x, &mut wide);
                    let weighted = out.iter_mut().zip(&wide).zip(&self.weight);
                    match &self.bias {
                        Some(bias) => {
                            for (((out, x), weight), bias) in weighted.zip(bias) {
                                *out = T::from_compute(*x * scale * *weight + *bias);
                            }
                        }
                        None if self.rounds => {
                            for ((out, x), weight) in weighted {
                                *out = T::from_compute(T::from_compute(*x * scale).to_compute() * *weight);
                            }
                        }
                        None => {
                            for ((out, x), weight) in weighted {
                                *out = T::from_compute(*x * scale * *weight);
                            }
                        }
                    }
                }
            }
        }));
        out
    }

    /// `(g - x * scale^2 * mean(g * x)) * scale` for `g = upstream * weight`, less its mean where the norm takes it off.
    fn backward(&self, x: &[T], upstream: &[T]) -> Vec<T> {
        let width = self.width();
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
                    let scale = self.scale_of(x, &mut wide);
                    for ((g, upstream), weight) in weighted.iter_mut().zip(upstream).zip(&self.weight) {
                        *g = upstream.to_compute() * *weight;
                    }
                    if self.bias.is_some() {
                        take_off_mean(&mut weighted);
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
}

/// The elements of a vector of any type.
fn wide<T: Number>(tensor: &Tensor) -> Result<Vec<T::Compute>> {
    for_dtype!(tensor.dtype(), S => with_elements::<S, _>(tensor, |values| {
        Ok(values.iter().map(|value| real(Element::to_f64(*value))).collect())
    }))
}

fn take_off_mean<C: super::storage::Real>(row: &mut [C]) {
    let sum = row.iter().fold(C::zero(), |sum, x| sum + *x);
    let mean = sum / real(row.len().max(1) as f64);
    row.iter_mut().for_each(|x| *x = *x - mean);
}

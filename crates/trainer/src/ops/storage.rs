//! From candle's tensors to the storage of a device, and on the CPU to slices of numbers.

use candle_core::{CpuStorage, CudaStorage, Layout, MetalStorage, Result, Storage, Tensor, WithDType, bail};
use trainable_tokens_core::Element;

/// An element type of tensors, with arithmetic in `f32` or `f64`.
pub(super) trait Number: Element<Compute: Real> + WithDType {}
impl<T: Element<Compute: Real> + WithDType> Number for T {}

/// A type that arithmetic runs in, and that products of matrices are made in.
pub(super) trait Real: num_traits::Float + Element<Compute = Self> {}
impl Real for f32 {}
impl Real for f64 {}

/// Runs code for the element type of a tensor.
macro_rules! for_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => candle_core::bail!("an operation of the decoder does not take {other:?}"),
        }
    };
}
pub(super) use for_dtype;

/// The elements of a contiguous tensor in CPU storage.
pub(super) fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let values = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("an operation of the decoder takes contiguous tensors"),
    }
}

/// Lends the elements of a tensor on the CPU.
pub(super) fn with_elements<T: WithDType, R>(
    tensor: &Tensor,
    work: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => work(elements(storage, layout)?),
        _ => bail!("a tensor of the operation does not lie on the CPU"),
    }
}

/// `sum(a * b)`, in several sums at once: quick and accurate.
pub(super) fn dot<C: Real>(a: &[C], b: &[C]) -> C {
    const LANES: usize = 16;
    let mut sums = [C::zero(); LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    let rest = rest.fold(C::zero(), |sum, (a, b)| sum + *a * *b);
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = *sum + *a * *b;
        }
    }
    sums.into_iter().fold(rest, |sum, part| sum + part)
}

/// A number of the type that arithmetic runs in.
pub(super) fn real<C: Real>(value: f64) -> C {
    <C as Element>::from_f64(value)
}

/// The storage, if it is the CPU's.
pub(super) fn cpu(storage: &Storage) -> Option<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Some(storage),
        _ => None,
    }
}

/// The storage, if it is a CUDA device's.
pub(super) fn cuda(storage: &Storage) -> Option<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Some(storage),
        _ => None,
    }
}

/// The storage, if it is a Metal device's.
pub(super) fn metal(storage: &Storage) -> Option<&MetalStorage> {
    match storage {
        Storage::Metal(storage) => Some(storage),
        _ => None,
    }
}

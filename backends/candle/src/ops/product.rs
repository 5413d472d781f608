//! Products with a frozen weight, never copied as a whole.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::utils::get_num_threads;
use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use trainable_tokens_core::Element;

use super::matrix::{Matrix, Old, multiply};
use super::storage::{DeviceStorage, elements};
use crate::convert::unsupported;

/// How many elements of the weight are widened at a time.
const CHUNK_ELEMENTS: usize = 1 << 18;
/// The fewest rows widened at a time; fewer make matrix products slow.
const CHUNK_ROWS: usize = 192;

/// Ranges of about equal length that cover the rows of a weight `[v, d]`, to widen one after the other for `n` rows
/// of input. None is much shorter than the others: for small matrices products sum in another order, and the parts
/// of a product must have the bits of the whole.
pub(super) fn chunks(n: usize, v: usize, d: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (CHUNK_ELEMENTS / d.max(1)).max(CHUNK_ROWS).max(n.min(1024));
    let count = v.div_ceil(rows);
    (0..count).map(move |i| i * v / count..(i + 1) * v / count)
}

/// `x · Wᵀ` for `x` `[n, D]` and the weight `[V, D]`, on any device.
pub(super) fn product<S: DeviceStorage>(x: &S, layout: &Layout, weight: &Tensor) -> Result<S> {
    let (n, (v, d)) = (layout.dims()[0], weight.dims2()?);
    if n == 0 || v == 0 || d == 0 {
        return x.zeros(&Shape::from((n, v)));
    }
    let transposed = weight.t()?;
    let (weight, weight_layout) = transposed.storage_and_layout();
    x.matmul(S::of(&weight)?, (1, n, v, d), layout, weight_layout)
}

/// [`product`] on the CPU, where candle widens the whole of a bf16 weight to multiply with it.
pub(super) fn product_on_cpu(x: &CpuStorage, layout: &Layout, weight: &Tensor) -> Result<CpuStorage> {
    let Some(x) = elements!(x, layout, BF16) else {
        return product(x, layout, weight);
    };
    let (n, (v, d)) = (layout.dims()[0], weight.dims2()?);
    if n == 0 || v == 0 || d == 0 {
        return Ok(CpuStorage::BF16(vec![bf16::ZERO; n * v]));
    }
    let (storage, weight_layout) = weight.storage_and_layout();
    let weight = elements!(CpuStorage::of(&storage)?, weight_layout, BF16).ok_or_else(unsupported)?;
    let x = CpuStorage::F32(x.to_f32_vec());
    let left = Layout::contiguous((n, d));
    let mut out = vec![bf16::ZERO; n * v];
    for range in chunks(n, v, d) {
        let (start, len) = (range.start, range.len());
        let rows = &weight[start * d..range.end * d];
        let columns = Layout::contiguous((len, d)).transpose(0, 1)?;
        let rows = CpuStorage::F32(rows.to_f32_vec());
        let part = x.matmul(&rows, (1, n, len, d), &left, &columns)?;
        let CpuStorage::F32(part) = part else {
            return Err(unsupported().into());
        };
        for (out, part) in out.chunks_exact_mut(v).zip(part.chunks_exact(len)) {
            out[start..start + len].convert_from_f32_slice(part);
        }
    }
    Ok(CpuStorage::BF16(out))
}

/// `g · W` for a contiguous `g` `[n, V]`. On the CPU half types are summed in `f32`, which is what is returned.
pub(super) fn product_transposed(g_tensor: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, (v, d)) = (g_tensor.dims()[0], weight.dims2()?);
    if n == 0 || v == 0 || d == 0 || !matches!(g_tensor.device(), Device::Cpu) {
        return g_tensor.matmul(weight);
    }
    let (g_storage, g_layout) = g_tensor.storage_and_layout();
    let (w_storage, w_layout) = weight.storage_and_layout();
    let (Storage::Cpu(g_cpu), Storage::Cpu(w_cpu)) = (&*g_storage, &*w_storage) else {
        return g_tensor.matmul(weight);
    };
    macro_rules! summed {
        ($($variant:ident $sum:ident),*) => {
            $(if let (Some(g), Some(w)) = (elements!(g_cpu, g_layout, $variant), elements!(w_cpu, w_layout, $variant)) {
                return Tensor::from_vec($sum(g, w, [n, v, d])?, (n, d), g_tensor.device());
            })*
        };
    }
    summed!(F32 sum, F64 sum, BF16 sum_chunks, F16 sum_chunks);
    drop((g_storage, w_storage));
    g_tensor.matmul(weight)
}

/// `g · W`, whose inner size is that of the vocabulary: candle's own product leaves threads waiting for each other.
fn sum<C: Element>(g: &[C], weight: &[C], [n, v, d]: [usize; 3]) -> Result<Vec<C>> {
    let mut sums = vec![C::default(); n * d];
    let (left, right) = (Matrix::new(g, [n, v]), Matrix::new(weight, [v, d]));
    let to = (Old::Replace, sums.as_mut_slice(), d);
    multiply(left, right, C::from_f64(1.0), to, get_num_threads())?;
    Ok(sums)
}

/// `g · W` in `f32`, widening some rows of `W` at a time.
fn sum_chunks<T>(g: &[T], weight: &[T], [n, v, d]: [usize; 3]) -> Result<Vec<f32>>
where
    [T]: HalfFloatSliceExt,
{
    let mut sums = vec![0f32; n * d];
    for range in chunks(n, v, d) {
        let (start, len) = (range.start, range.len());
        let rows = &weight[start * d..range.end * d];
        let mut columns = vec![0f32; n * len];
        for (to, from) in columns.chunks_exact_mut(len).zip(g.chunks_exact(v)) {
            from[start..start + len].convert_to_f32_slice(to);
        }
        let (left, right) = (Layout::contiguous((n, len)), Layout::contiguous((len, d)));
        let rows = CpuStorage::F32(rows.to_f32_vec());
        let part = CpuStorage::F32(columns).matmul(&rows, (1, n, d, len), &left, &right)?;
        let CpuStorage::F32(part) = part else {
            return Err(unsupported().into());
        };
        sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
    }
    Ok(sums)
}

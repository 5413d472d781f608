//! `x · Wᵀ + b` with a gradient for `x` alone.

use candle_core::op::Add;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use crate::convert::unsupported;
use crate::ops::cast;
use crate::ops::product::{product, product_on_cpu, product_transposed};
use crate::ops::storage::{DeviceStorage, elements};

/// The projection as an operation on its input. Weight and bias are captured: they are no part of the graph.
pub(super) struct Project {
    pub(super) weight: Tensor,
    bias: Option<Tensor>,
}

impl Project {
    pub(super) fn new(weight: &Tensor, bias: Option<&Tensor>) -> Self {
        Self {
            weight: weight.clone(),
            bias: bias.cloned(),
        }
    }

    /// The shape of the result for an input of layout `x`.
    pub(super) fn shape(&self, x: &Layout) -> Shape {
        Shape::from((x.dims()[0], self.weight.dims()[0]))
    }

    /// Adds the bias to a product, on any device.
    pub(super) fn add_bias<S: DeviceStorage>(&self, product: S, shape: &Shape) -> Result<S> {
        let Some(bias) = self.bias.as_ref().filter(|_| shape.elem_count() > 0) else {
            return Ok(product);
        };
        let bias = bias.broadcast_as(shape)?;
        let (bias, layout) = bias.storage_and_layout();
        product.binary_impl::<Add>(S::of(&bias)?, &Layout::contiguous(shape), layout)
    }

    /// Adds the bias to a product in place.
    pub(super) fn add_bias_on_cpu(&self, product: &mut CpuStorage) -> Result<()> {
        fn add<T: Copy + std::ops::Add<Output = T>>(product: &mut [T], bias: &[T]) {
            for row in product.chunks_exact_mut(bias.len().max(1)) {
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x = *x + *bias);
            }
        }
        let Some(bias) = &self.bias else {
            return Ok(());
        };
        let (bias, layout) = bias.storage_and_layout();
        let bias = CpuStorage::of(&bias)?;
        match product {
            CpuStorage::F32(x) => add::<f32>(x, elements!(bias, layout, F32).ok_or_else(unsupported)?),
            CpuStorage::BF16(x) => add::<bf16>(x, elements!(bias, layout, BF16).ok_or_else(unsupported)?),
            CpuStorage::F16(x) => add::<f16>(x, elements!(bias, layout, F16).ok_or_else(unsupported)?),
            CpuStorage::F64(x) => add::<f64>(x, elements!(bias, layout, F64).ok_or_else(unsupported)?),
            _ => return Err(unsupported().into()),
        }
        Ok(())
    }

    fn forward<S: DeviceStorage>(&self, x: &S, layout: &Layout) -> Result<(S, Shape)> {
        let rows = as_rows(layout)?;
        let out = product(x, &rows, &self.weight)?;
        Ok((self.add_bias(out, &self.shape(&rows))?, self.whole_shape(layout)))
    }

    /// The shape of the result for an input of any rank but 0.
    fn whole_shape(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.weight.dims()[0];
        }
        Shape::from(dims)
    }
}

/// The rows of a contiguous input. Reshaping the input instead would cost a backward pass two copies more.
fn as_rows(x: &Layout) -> Result<Layout> {
    match x.dims() {
        [leading @ .., width] if x.is_contiguous() => {
            let shape = (leading.iter().product::<usize>(), *width);
            Ok(Layout::contiguous_with_offset(shape, x.start_offset()))
        }
        dims => bail!("an input of shape {dims:?} has no rows that lie one after the other"),
    }
}

impl CustomOp1 for Project {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = product_on_cpu(x, &as_rows(layout)?, &self.weight)?;
        self.add_bias_on_cpu(&mut out)?;
        Ok((out, self.whole_shape(layout)))
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(x, layout)
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let shape = self.shape(&as_rows(&Layout::contiguous(x.shape()))?);
        let upstream = upstream.detach().contiguous()?.reshape(shape)?;
        cast(&product_transposed(&upstream, &self.weight)?, x.dtype())?
            .reshape(x.shape())
            .map(Some)
    }
}

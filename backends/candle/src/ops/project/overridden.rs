//! `x · Wᵀ + b` for a weight of which some rows are overridden by trained ones.

use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Result, Shape, Tensor};

use super::Overrides;
use super::plain::Project;
use crate::convert::unsupported;
use crate::ops::product::{product, product_on_cpu, product_transposed};
use crate::ops::storage::DeviceStorage;
use crate::ops::{cast, compute_dtype};

/// The projection as an operation on its input and the trained rows.
///
/// A row that still equals the base's keeps the base's column: a product of another shape may round otherwise, and
/// untrained rows must be a no-op to the last bit.
pub(super) struct ProjectOverridden {
    plain: Project,
    overrides: Overrides,
}

impl ProjectOverridden {
    pub(super) fn new(plain: Project, overrides: Overrides) -> Self {
        Self { plain, overrides }
    }

    pub(super) fn forward<S: DeviceStorage>(&self, x: &S, layout: &Layout) -> Result<(S, Shape)> {
        let shape = self.plain.shape(layout);
        let mut out = product(x, layout, &self.plain.weight)?;
        let (n, d) = (layout.dims()[0], layout.dims()[1]);
        let k = self.overrides.rows.dims()[0];
        if n > 0 && d > 0 && k > 0 {
            let Overrides {
                rows,
                base_rows,
                columns,
                ..
            } = &self.overrides;
            let changed = rows.ne(base_rows)?.to_dtype(DType::F32)?.max(1)?;
            let changed = changed.to_dtype(DType::U8)?.broadcast_as((n, k))?;
            let at = columns.unsqueeze(0)?.broadcast_as((n, k))?.contiguous()?;
            let (all, part) = (Layout::contiguous(&shape), Layout::contiguous((n, k)));
            let trained = product(x, layout, rows)?;
            let (columns, columns_layout) = columns.storage_and_layout();
            let kept = out.index_select(S::of(&columns)?, &all, columns_layout, 1)?;
            let (changed, changed_layout) = changed.storage_and_layout();
            let chosen = S::of(&changed)?.where_cond(changed_layout, &trained, &part, &kept, &part)?;
            let (at, at_layout) = at.storage_and_layout();
            out.scatter_set(&all, S::of(&at)?, at_layout, &chosen, &part, 1)?;
        }
        Ok((self.plain.add_bias(out, &shape)?, shape))
    }

    fn override_on_cpu(&self, x: &CpuStorage, layout: &Layout, out: &mut CpuStorage) -> Result<()> {
        let slots = self.overrides.changed_slots()?;
        if slots.is_empty() || layout.dims()[0] == 0 {
            return Ok(());
        }
        let columns: Vec<u32> = self.overrides.columns.to_vec1()?;
        let columns: Vec<usize> = slots
            .iter()
            .map(|slot| columns[*slot as usize] as usize)
            .collect();
        let slots = Tensor::from_slice(&slots, slots.len(), self.overrides.rows.device())?;
        let trained = product_on_cpu(x, layout, &self.overrides.rows.index_select(&slots, 0)?)?;
        let width = self.plain.weight.dims()[0];
        match (out, &trained) {
            (CpuStorage::F32(out), CpuStorage::F32(trained)) => overwrite(out, width, trained, &columns),
            (CpuStorage::BF16(out), CpuStorage::BF16(trained)) => overwrite(out, width, trained, &columns),
            (CpuStorage::F16(out), CpuStorage::F16(trained)) => overwrite(out, width, trained, &columns),
            (CpuStorage::F64(out), CpuStorage::F64(trained)) => overwrite(out, width, trained, &columns),
            _ => return Err(unsupported().into()),
        }
        Ok(())
    }
}

/// Puts the columns of `part` at `columns` of `out`, whose rows are `width` long.
fn overwrite<T: Copy>(out: &mut [T], width: usize, part: &[T], columns: &[usize]) {
    let rows = out.chunks_exact_mut(width).zip(part.chunks_exact(columns.len()));
    for (out, part) in rows {
        for (column, value) in columns.iter().zip(part) {
            out[*column] = *value;
        }
    }
}

impl CustomOp2 for ProjectOverridden {
    fn name(&self) -> &'static str {
        "trainable-tokens-head"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = product_on_cpu(x, layout, &self.plain.weight)?;
        self.override_on_cpu(x, layout, &mut out)?;
        self.plain.add_bias_on_cpu(&mut out)?;
        Ok((out, self.plain.shape(layout)))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward(x, layout)
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        layout: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.forward(x, layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        delta: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Overrides {
            rows,
            base_rows,
            columns,
            ..
        } = &self.overrides;
        let upstream = upstream.detach().contiguous()?;
        let dtype = compute_dtype(upstream.dtype());
        let trained = cast(&upstream.index_select(columns, 1)?, dtype)?;
        let x_gradient = if x.track_op() {
            let difference = (rows.to_dtype(dtype)? - base_rows.to_dtype(dtype)?)?;
            let gradient = cast(&product_transposed(&upstream, &self.plain.weight)?, dtype)?;
            Some(cast(&(gradient + trained.matmul(&difference)?)?, x.dtype())?)
        } else {
            None
        };
        let gradient = trained.t()?.matmul(&cast(&x.detach(), dtype)?)?;
        Ok((x_gradient, Some(gradient.to_dtype(delta.dtype())?)))
    }
}

//! The lookup on any device, out of operations that every storage of candle has.

use candle_core::op::{Mul, ReduceOp, Sqr};
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Tensor};
use trainable_tokens_core::{EmbeddingSource, LookupPlan, MaxNorm, RowTransform};

use crate::convert::unsupported;
use crate::ops::storage::DeviceStorage;
use crate::ops::{cast, compute_dtype};
use crate::{CandleDelta, CandleTable};

/// What a batch needs on the device, sent there once for both passes.
pub(super) struct Uploaded {
    num_ids: usize,
    ids: Option<Tensor>,
    /// Rows that override, gathered and converted, and the position of each of their elements.
    patch: Option<(Tensor, Tensor)>,
    /// Positions and slots of the gradient.
    live: Option<(Tensor, Tensor)>,
    /// What each of the live gradients is multiplied by, `[live, 1]`.
    weights: Option<Tensor>,
    max_norm: Option<MaxNorm>,
    /// The factor, in the type that it multiplies in.
    factor: Option<Tensor>,
}

impl Uploaded {
    pub(super) fn new(
        table: &CandleTable,
        delta: Option<&CandleDelta>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Self> {
        let (base, dim) = (table.tensor(), table.embedding_dim());
        let device = base.device();
        let indexes = |values: &[u32]| {
            (!values.is_empty())
                .then(|| Tensor::from_slice(values, values.len(), device))
                .transpose()
        };
        let (mut patch, mut live) = (None, None);
        if let Some(delta) = delta {
            let (at, slots) = (indexes(plan.positions())?, indexes(plan.slots())?);
            if let (Some(at), Some(slots)) = (&at, &slots) {
                let rows = delta.tensor().detach().index_select(slots, 0)?;
                let ids = plan.positions().iter().map(|at| plan.input_ids()[*at as usize]);
                let rows = narrowed(&rows, base, || indexes(&ids.collect::<Vec<_>>()))?;
                let at = at.unsqueeze(1)?.broadcast_as((plan.positions().len(), dim))?;
                patch = Some((rows, at.contiguous()?));
            }
            live = if plan.grad_positions() == plan.positions() {
                at.zip(slots)
            } else {
                indexes(plan.grad_positions())?.zip(indexes(plan.grad_slots())?)
            };
        }
        Ok(Self {
            num_ids: plan.len(),
            ids: indexes(plan.input_ids())?,
            patch,
            live,
            weights: plan
                .grad_factors()
                .filter(|weights| !weights.is_empty())
                .map(|weights| column(weights, compute_dtype(base.dtype()), device))
                .transpose()?,
            max_norm: transform.max_norm,
            factor: transform.scale.map(|factor| scalar(factor, base)).transpose()?,
        })
    }

    /// The gradient of the delta: live rows of the contiguous `upstream`, summed by slot in the compute type.
    pub(super) fn accumulate(&self, upstream: &Tensor, delta: &Tensor) -> Result<Tensor> {
        let Some((positions, slots)) = &self.live else {
            return delta.zeros_like();
        };
        let dtype = compute_dtype(upstream.dtype());
        let live = upstream.index_select(positions, 0)?.to_dtype(dtype)?;
        let weights = match (&self.factor, &self.weights) {
            (Some(factor), Some(weights)) => Some(factor.broadcast_mul(weights)?),
            (factor, weights) => factor.clone().or_else(|| weights.clone()),
        };
        let live = match weights {
            None => live,
            Some(weights) => live.broadcast_mul(&weights.to_dtype(dtype)?)?,
        };
        Tensor::zeros(delta.shape(), dtype, delta.device())?
            .index_add(slots, &live, 0)?
            .to_dtype(delta.dtype())
    }
}

/// Rows in the table's type. A GPU narrows every NaN to the same one, but rows that were never trained keep the bits of the
/// table's own: those where both are NaN. `ids` says which they are.
fn narrowed(rows: &Tensor, base: &Tensor, ids: impl FnOnce() -> Result<Option<Tensor>>) -> Result<Tensor> {
    let narrow = cast(rows, base.dtype())?;
    if rows.dtype() == base.dtype() || rows.elem_count() == 0 {
        return Ok(narrow);
    }
    let Some(ids) = ids()? else {
        return Ok(narrow);
    };
    let own = base.index_select(&ids, 0)?;
    let both = (own.ne(&own)? * rows.ne(rows)?)?;
    both.where_cond(&own, &narrow)
}

/// A number in the compute type of `like`, on its device.
fn scalar(value: f64, like: &Tensor) -> Result<Tensor> {
    Tensor::new(&[value], &Device::Cpu)?
        .to_dtype(compute_dtype(like.dtype()))?
        .to_device(like.device())
}

/// Gathers the rows of a batch.
pub(super) fn gather<S: DeviceStorage>(base: &S, layout: &Layout, batch: &Uploaded) -> Result<S> {
    let shape = Shape::from((batch.num_ids, layout.dims()[1]));
    let Some(ids) = batch.ids.as_ref().filter(|_| shape.elem_count() > 0) else {
        return base.zeros(&shape);
    };
    let ids_device = ids.device().clone();
    let (ids, ids_layout) = ids.storage_and_layout();
    let mut out = base.index_select(S::of(&ids)?, layout, ids_layout, 0)?;
    let rows = Layout::contiguous(shape.clone());
    if let Some((patch, at)) = &batch.patch {
        let (patch, patch_layout) = patch.storage_and_layout();
        let (at, at_layout) = at.storage_and_layout();
        out.scatter_set(&rows, S::of(&at)?, at_layout, S::of(&patch)?, patch_layout, 0)?;
    }
    if let Some(max_norm) = batch.max_norm {
        let factors = shortening(&out, &rows, max_norm, &ids_device)?;
        out = multiply(&out, &rows, &factors)?;
    }
    match &batch.factor {
        None => Ok(out),
        Some(factor) => multiply(&out, &rows, factor),
    }
}

/// What each row is multiplied by so that none is longer than `max_norm`, `[N, 1]` in the compute type. The norms
/// come to the host: there is one for each token of the batch.
fn shortening<S: DeviceStorage>(
    out: &S,
    rows: &Layout,
    max_norm: MaxNorm,
    device: &Device,
) -> Result<Tensor> {
    let dtype = compute_dtype(out.dtype());
    let squares = out.to_dtype(rows, dtype)?.unary_impl::<Sqr>(rows)?;
    let sums = squares.reduce_op(ReduceOp::Sum, rows, &[1])?.to_cpu_storage()?;
    let sums: Vec<f64> = match sums {
        CpuStorage::F64(sums) => sums,
        CpuStorage::F32(sums) => sums.into_iter().map(f64::from).collect(),
        _ => return Err(unsupported().into()),
    };
    let factors = sums.iter().map(|sum| max_norm.factor(sum.sqrt()).unwrap_or(1.0));
    let factors: Vec<f64> = factors.collect();
    column(&factors, dtype, device)
}

/// A column of numbers, `[N, 1]`.
fn column(values: &[f64], dtype: DType, device: &Device) -> Result<Tensor> {
    let values = Tensor::from_slice(values, (values.len(), 1), &Device::Cpu)?;
    values.to_dtype(dtype)?.to_device(device)
}

/// Multiplies in the compute type and rounds.
///
/// Not `affine`: its `+ 0` makes a negative zero positive, and for half types it would compute in half.
fn multiply<S: DeviceStorage>(out: &S, rows: &Layout, factor: &Tensor) -> Result<S> {
    let factor = factor.broadcast_as(rows.shape())?;
    let (factor, factor_layout) = factor.storage_and_layout();
    let factor = S::of(&factor)?;
    let dtype = out.dtype();
    if dtype == compute_dtype(dtype) {
        return out.binary_impl::<Mul>(factor, rows, factor_layout);
    }
    out.to_dtype(rows, compute_dtype(dtype))?
        .binary_impl::<Mul>(factor, rows, factor_layout)?
        .to_dtype(rows, dtype)
}

//! The loss on any device, of candle's own operations.

use candle_core::{D, DType, Tensor};
use trainable_tokens_core::CrossEntropyPlan;

use super::{Computed, Projection, Wanted};
use crate::Result;
use crate::ops::compute_dtype;
use crate::ops::product::product_transposed;

/// The loss of contiguous hidden states `[N, D]`.
pub(super) fn compute(
    hidden: &Tensor,
    projection: &Projection<'_>,
    plan: &CrossEntropyPlan,
    wanted: Wanted,
) -> Result<Computed> {
    let device = hidden.device();
    let dtype = compute_dtype(hidden.dtype());
    let dim = projection.weight.dims2()?.1;
    let mut loss = Tensor::zeros((), dtype, device)?;
    let mut of_hidden = Vec::new();
    let mut of_delta = None;
    for chunk in plan.chunks(dtype.size_in_bytes()) {
        let n = chunk.len();
        let positions = Tensor::from_slice(&plan.positions()[chunk.clone()], n, device)?;
        let labels = Tensor::from_slice(&plan.labels()[chunk], (n, 1), device)?;
        let rows = hidden.index_select(&positions, 0)?;
        let logits = projection.logits(&rows)?.to_dtype(dtype)?;
        let softcap = plan.options().softcap.map(trainable_tokens_core::Softcap::get);
        let logits = match softcap {
            None => logits,
            Some(softcap) => ((logits / softcap)?.tanh()? * softcap)?,
        };
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let of_labels = shifted.gather(&labels, D::Minus1)?;
        let exponentials = shifted.exp()?;
        drop(shifted);
        let sums = exponentials.sum_keepdim(D::Minus1)?;
        loss = (loss + ((sums.log()? - of_labels)?.sum_all()? * plan.factor())?)?;
        if !wanted.of_hidden && !wanted.of_delta {
            continue;
        }
        let gradient = exponentials.broadcast_mul(&(sums.recip()? * plan.factor())?)?;
        drop(exponentials);
        let minus = (labels.ones_like()?.to_dtype(dtype)? * -plan.factor())?;
        gradient.scatter_add_set(&labels, &minus, D::Minus1)?;
        let gradient = match softcap {
            None => gradient,
            Some(softcap) => (gradient * (logits / softcap)?.sqr()?.affine(-1.0, 1.0)?)?,
        };
        let trained = match projection.overrides {
            None => None,
            Some(overrides) => Some((overrides, gradient.index_select(&overrides.columns, 1)?)),
        };
        if let Some((_, trained)) = trained.as_ref().filter(|_| wanted.of_delta) {
            let sum = trained.t()?.matmul(&rows.to_dtype(dtype)?)?;
            of_delta = Some(match of_delta {
                None => sum,
                Some(sums) => (sums + sum)?,
            });
        }
        if wanted.of_hidden {
            let mut sum = projection.transposed(&gradient)?;
            if let Some((overrides, trained)) = &trained {
                let rows = [&overrides.rows, &overrides.base_rows].map(|rows| rows.to_dtype(dtype));
                let [rows, base_rows] = rows;
                sum = (sum + trained.matmul(&(rows? - base_rows?)?)?)?;
            }
            of_hidden.push(sum);
        }
    }
    Ok(Computed {
        loss,
        of_hidden: wanted
            .of_hidden
            .then(|| place(&of_hidden, hidden, plan))
            .transpose()?,
        of_delta: match (of_delta, projection.overrides) {
            (None, Some(overrides)) if wanted.of_delta => {
                let k = overrides.columns.dims()[0];
                Some(Tensor::zeros((k, dim), dtype, device)?)
            }
            (of_delta, _) => of_delta,
        },
    })
}

/// Rows of gradients at the positions that count, among zeros.
fn place(parts: &[Tensor], hidden: &Tensor, plan: &CrossEntropyPlan) -> Result<Tensor> {
    let (n, m, device) = (plan.num_rows(), plan.positions().len(), hidden.device());
    let zeros = || Tensor::zeros(hidden.dims(), compute_dtype(hidden.dtype()), device);
    if parts.is_empty() {
        return Ok(zeros()?);
    }
    let rows = Tensor::cat(parts, 0)?;
    if n == m {
        return Ok(rows);
    }
    let positions = Tensor::from_slice(plan.positions(), m, device)?;
    Ok(zeros()?.index_add(&positions, &rows, 0)?)
}

impl Projection<'_> {
    /// The logits `[n, V]` of `rows` `[n, D]`, in their type.
    fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let logits = rows.matmul(&self.weight.t()?)?;
        if let Some(overrides) = self.overrides {
            let (n, k) = (rows.dims()[0], overrides.columns.dims()[0]);
            // A row that equals the weight's keeps the weight's column, to the bit.
            let changed = overrides.rows.ne(&overrides.base_rows)?;
            let changed = changed.to_dtype(DType::F32)?.max(1)?;
            let changed = changed.to_dtype(DType::U8)?.broadcast_as((n, k))?.contiguous()?;
            let kept = logits.index_select(&overrides.columns, 1)?;
            let trained = changed.where_cond(&rows.matmul(&overrides.rows.t()?)?, &kept)?;
            let at = overrides
                .columns
                .unsqueeze(0)?
                .broadcast_as((n, k))?
                .contiguous()?;
            logits.scatter_set(&at, &trained, 1)?;
        }
        match self.bias {
            None => Ok(logits),
            Some(bias) => Ok(logits.broadcast_add(bias)?),
        }
    }

    /// `gradient · W` for the weight as it is, in the gradient's type.
    fn transposed(&self, gradient: &Tensor) -> Result<Tensor> {
        let dtype = self.weight.dtype();
        let sum = product_transposed(&gradient.to_dtype(dtype)?, self.weight)?;
        Ok(sum.to_dtype(gradient.dtype())?)
    }
}

//! The projection on a frozen weight, with or without some columns of the result overridden.

mod overridden;
mod plain;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, Tensor};
use trainable_tokens_core::Error as CoreError;

use self::overridden::ProjectOverridden;
use self::plain::Project;
use crate::convert::{core_dtype, unsupported};
use crate::ops::cast;
use crate::ops::storage::{DeviceStorage, elements};
use crate::{Error, Result};

/// Trained rows in the place of some rows of a weight, as they are at the time of the call.
pub(crate) struct Overrides {
    pub(crate) delta: Tensor,
    /// A copy of the delta in the weight's type, `[k, D]`.
    pub(crate) rows: Tensor,
    /// The weight's own rows, `[k, D]`.
    pub(crate) base_rows: Tensor,
    /// Which rows of the weight they are, `[k]`.
    pub(crate) columns: Tensor,
}

impl Overrides {
    /// Overrides the rows `columns` (at least one) of `weight` with `delta`, a leaf or a node of the graph.
    pub(crate) fn new(weight: &Tensor, delta: &Tensor, columns: Tensor) -> Result<Self> {
        let rows = delta.detach();
        let rows = if rows.dtype() == weight.dtype() {
            rows.copy()?
        } else {
            cast(&rows, weight.dtype())?
        };
        Ok(Self {
            delta: delta.clone(),
            rows,
            base_rows: weight.index_select(&columns, 0)?,
            columns,
        })
    }

    /// The slots whose row differs from the base's, on the CPU.
    ///
    /// # Errors
    ///
    /// When the rows lie elsewhere.
    pub(crate) fn changed_slots(&self) -> Result<Vec<u32>> {
        fn differing<T: PartialEq>(rows: &[T], base: &[T], dim: usize) -> Vec<u32> {
            let rows = rows.chunks_exact(dim).zip(base.chunks_exact(dim));
            let differing = (0u32..).zip(rows).filter(|(_, (row, base))| row != base);
            differing.map(|(slot, _)| slot).collect()
        }
        let dim = self.rows.dims()[1].max(1);
        let (rows, rows_layout) = self.rows.storage_and_layout();
        let (base, base_layout) = self.base_rows.storage_and_layout();
        let (rows, base) = (CpuStorage::of(&rows)?, CpuStorage::of(&base)?);
        macro_rules! compare {
            ($($variant:ident)*) => {
                $(if let (Some(rows), Some(base)) = (
                    elements!(rows, rows_layout, $variant),
                    elements!(base, base_layout, $variant),
                ) {
                    return Ok(differing(rows, base, dim));
                })*
            };
        }
        compare!(F32 BF16 F16 F64);
        Err(unsupported())
    }
}

/// `x · Wᵀ + b` for `x` `[.., D]`, the detached weight `[V, D]` and the detached bias `[V]`. Gradients go to `x`
/// and to the overriding rows, never to weight or bias.
pub(crate) fn project(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    overrides: Option<Overrides>,
) -> Result<Tensor> {
    let (v, d) = weight.dims2()?;
    let leading = check_input(x, weight)?;
    let plain = Project::new(weight, bias);
    let Some(overrides) = overrides else {
        return Ok(x.contiguous()?.apply_op1(plain)?);
    };
    let shape = [leading, &[v]].concat();
    let rows = leading.iter().product::<usize>();
    let delta = overrides.delta.clone();
    let out = x
        .reshape((rows, d))?
        .apply_op2(&delta, ProjectOverridden::new(plain, overrides))?;
    Ok(out.reshape(shape)?)
}

/// The leading dimensions of an input `[.., D]` for a weight `[V, D]`.
///
/// # Errors
///
/// When shape, element type or device do not fit the weight.
pub(crate) fn check_input<'a>(x: &'a Tensor, weight: &Tensor) -> Result<&'a [usize]> {
    let what = "input of the projection";
    let Some((&last, leading)) = x.dims().split_last() else {
        let (expected, got) = ("[.., in_features]", Vec::new());
        return Err(Error::Rank { what, expected, got });
    };
    let d = weight.dims2()?.1;
    if last != d {
        return Err(CoreError::shape(what, &[leading, &[d]].concat(), x.dims()).into());
    }
    if x.dtype() != weight.dtype() {
        let expected = core_dtype("weight", weight.dtype())?;
        let got = core_dtype(what, x.dtype())?;
        return Err(Error::Core(CoreError::DType { what, expected, got }));
    }
    if !x.device().same_device(weight.device()) {
        return Err(Error::Device {
            what,
            expected: weight.device().location(),
            got: x.device().location(),
        });
    }
    Ok(leading)
}

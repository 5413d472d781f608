//! `hidden · Wᵀ` for a table of which some rows are overridden by trained ones.

use burn::tensor::{DType, Device, IndexingUpdateOp, Tensor};
use trainable_tokens_core::{EmbeddingSource, Error as CoreError, TokenSet};

use super::gradient::{Factor, zero_with_gradient};
use crate::convert::{compute_dtype, core_dtype, to_indices};
use crate::{BurnTable, Error, Result};

/// The trained rows of a head and the columns that they override.
pub(crate) struct Overrides {
    pub(super) delta: Tensor<2>,
    pub(super) columns: Vec<u32>,
}

impl Overrides {
    /// The rows `[k, D]` of at least one token.
    pub(crate) fn new(delta: Tensor<2>, tokens: &TokenSet) -> Self {
        let columns = tokens.to_vec();
        Self { delta, columns }
    }
}

/// The logits `[N, V]` of `hidden` `[N, D]`. The table gets no gradient; the trained rows and `hidden` do.
///
/// A row that still equals the base's keeps the base's column: a product of another shape may round otherwise, and
/// untrained rows must be a no-op to the last bit.
///
/// # Errors
///
/// When the hidden states do not fit the table.
pub(crate) fn project(
    hidden: Tensor<2>,
    table: &BurnTable,
    overrides: Option<&Overrides>,
) -> Result<Tensor<2>> {
    let ([num_ids, width], dim) = (hidden.dims(), table.embedding_dim());
    let what = "hidden states of the head";
    if width != dim {
        return Err(CoreError::shape(what, &[num_ids, dim], &[num_ids, width]).into());
    }
    check_like(what, &hidden, table)?;
    let weight = table.tensor();
    let logits = product(hidden.clone(), weight);
    let Some(Overrides { delta, columns }) = overrides else {
        return Ok(logits);
    };
    let columns = to_indices(columns, &weight.device());
    let (dtype, compute) = (weight.dtype(), compute_dtype(weight.dtype()));

    // The rows as the table would hold them, but with a gradient that is not rounded.
    let rounded = delta.clone().detach().cast(dtype);
    let rows = if dtype == compute {
        delta.clone().cast(dtype)
    } else {
        let exact = delta.clone().cast(compute);
        rounded.clone().cast(compute) + zero_with_gradient(exact, Factor::All(1.0))
    };
    let trained = hidden.cast(compute).matmul(rows.transpose());

    let base_rows = weight.clone().select(0, columns.clone());
    let unchanged = rounded.not_equal(base_rows).any_dim(1).bool_not();
    let unchanged = unchanged.transpose().expand(trained.shape());
    let kept = logits.clone().detach().select(1, columns.clone());
    let chosen = trained.clone().detach().cast(dtype).mask_where(unchanged, kept);
    let chosen = if trained.is_tracked() {
        chosen + zero_with_gradient(trained, Factor::All(1.0)).cast(dtype)
    } else {
        chosen
    };
    Ok(logits.select_assign(1, columns, chosen, IndexingUpdateOp::Assign))
}

/// Refuses a tensor of another element type than the table's, or on another device.
///
/// # Errors
///
/// The two.
pub(crate) fn check_like<const R: usize>(
    what: &'static str,
    tensor: &Tensor<R>,
    table: &BurnTable,
) -> Result<()> {
    let (expected, got) = (table.tensor().device(), tensor.device());
    if expected != got {
        let (expected, got) = (format!("{expected:?}"), format!("{got:?}"));
        return Err(Error::Device { what, expected, got });
    }
    let (expected, got) = (table.dtype(), core_dtype(what, tensor.dtype())?);
    if expected != got {
        return Err(CoreError::DType { what, expected, got }.into());
    }
    Ok(())
}

/// `hidden · Wᵀ`, without a copy of the weight.
fn product(hidden: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    if weight.dtype() != DType::BF16 || !is_flex(&weight.device()) {
        return hidden.matmul(weight.clone().transpose());
    }
    let ([num_ids, dim], [vocab_size, _]) = (hidden.dims(), weight.dims());
    // Each block converts `hidden` and holds a gradient of it: with no fewer rows than these all blocks together cost no
    // more than the logits.
    let block = num_ids.max(dim).max(MIN_BLOCK);
    // The gradients of the blocks are summed in f32.
    let hidden = hidden.cast(DType::F32);
    let blocks = (0..vocab_size.max(1)).step_by(block).map(|start| {
        let rows = weight.clone().narrow(0, start, block.min(vocab_size - start));
        hidden.clone().cast(DType::BF16).matmul(rows.transpose())
    });
    Tensor::cat(blocks.collect(), 1)
}

/// Rows of the table that Flex converts at a time, at least. Burn's graph holds some 9 KB for each block, whatever its size,
/// and a mixed head has blocks for each of its parts.
pub(super) const MIN_BLOCK: usize = 1024;

/// Whether the device is burn's Flex, which multiplies bf16 matrices by converting both of them, whole, to f32.
pub(super) fn is_flex(device: &Device) -> bool {
    format!("{device:?}").contains("Flex(")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flex_is_known_by_its_name() {
        let device = Device::flex();
        assert!(
            is_flex(&device) && is_flex(&device.autodiff()),
            "{:?}",
            Device::flex()
        );
    }
}

//! One merge that was not undone.

use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, Tensor};
use trainable_tokens_core::{DType, MergeParts, TokenId, TokenRows};

use crate::Result;
use crate::convert::{to_indices, to_rows, to_tensor};
use crate::ids::read_ids;

/// The rows that a merge overwrote, as parameters of burn's: a record of a merged module has them.
#[derive(Module, Debug)]
pub(super) struct MergedRows {
    rows: Param<Tensor<2>>,
    ids: Param<Tensor<1, Int>>,
    #[module(skip)]
    adapters: Vec<Arc<str>>,
}

impl MergedRows {
    pub(super) fn from_core(merge: &MergeParts, device: &Device) -> Result<Self> {
        let rows = to_tensor("overwritten rows", &merge.overwritten, device)?;
        let ids: Vec<u32> = merge.tokens.iter().map(|id| id.0).collect();
        Ok(Self {
            rows: Param::initialized(ParamId::new(), rows),
            ids: Param::initialized(ParamId::new(), to_indices(&ids, device)),
            adapters: merge.adapters.clone(),
        })
    }

    /// The merge with its rows on the host, for the one that undoes it.
    pub(super) fn read(&self, vocab_size: usize) -> Result<MergeParts> {
        let ids = read_ids(self.ids.val(), vocab_size)?;
        Ok(MergeParts {
            adapters: self.adapters.clone(),
            tokens: ids.into_iter().map(TokenId).collect(),
            overwritten: to_rows("overwritten rows", self.rows.val())?,
        })
    }

    /// The merge without its rows, for those to whom it is enough that it happened.
    pub(super) fn outline(&self, dtype: DType, dim: usize) -> MergeParts {
        MergeParts {
            adapters: self.adapters.clone(),
            tokens: Vec::new(),
            overwritten: TokenRows::zeros(dtype, 0, dim),
        }
    }

    pub(super) fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|name| &**name)
    }
}

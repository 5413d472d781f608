//! The merged weight in the place of the frozen one.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use trainable_tokens_core::{Error as CoreError, MergeCheck, Overlap, TokenRows};

use super::wrapped::Wrapped;
use crate::TrainableTokens;

/// A variable builder that serves the tensor `name` with the rows `token_ids` replaced by `rows`, so that any model,
/// unmodified, runs with them: its outputs equal those after a merge.
///
/// Names are relative to the prefix of `inner`. For more than one name of the tensor, or more than one adapter, see
/// [`MergedBackend`].
///
/// ```
/// # use std::collections::HashMap;
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{Module, VarBuilder};
/// # use trainable_tokens_candle::merged_var_builder;
/// # use trainable_tokens_core::TokenRows;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let rows = TokenRows::new(vec![1f32, 2.0, 3.0, 4.0], 2, 2)?;
/// let vb = merged_var_builder(vb, "model.embed_tokens.weight", &[5, 7], rows);
/// let embed = candle_nn::embedding(10, 2, vb.pp("model.embed_tokens"))?;
/// let row = embed.forward(&Tensor::new(&[7u32], &Device::Cpu)?)?;
/// assert_eq!(row.to_vec2::<f32>()?, [[3.0, 4.0]]);
/// # Ok(())
/// # }
/// ```
pub fn merged_var_builder<'a>(
    inner: VarBuilder<'a>,
    name: &str,
    token_ids: &[u32],
    rows: TokenRows,
) -> VarBuilder<'a> {
    let (dtype, device) = (inner.dtype(), inner.device().clone());
    let backend = MergedBackend::new(Box::new(Wrapped(inner)), name, token_ids, rows);
    VarBuilder::new_with_args(Box::new(backend) as Box<dyn SimpleBackend + 'a>, dtype, &device)
}

/// A source of tensors for [`VarBuilder`] that merges the trained rows of one or several adapters into one of them.
///
/// The rows are rounded to the type in which the tensor is asked for, as merging into the loaded table does. The
/// merged tensor is made once, from a copy, and every request for it shares its storage; all other tensors pass
/// through. Ids and rows that do not fit the tensor are an error when it is asked for.
pub struct MergedBackend<'a> {
    inner: Box<dyn SimpleBackend + 'a>,
    name: String,
    aliases: Vec<String>,
    adapters: Vec<Adapter>,
    overlap: Overlap,
    check: MergeCheck,
    made: Mutex<Option<Tensor>>,
}

struct Adapter {
    name: String,
    token_ids: Vec<u32>,
    rows: TokenRows,
}

impl<'a> MergedBackend<'a> {
    /// Replaces the rows `token_ids` of the tensor `name`, by an adapter called `default`.
    pub fn new(inner: Box<dyn SimpleBackend + 'a>, name: &str, token_ids: &[u32], rows: TokenRows) -> Self {
        Self {
            inner,
            name: name.to_owned(),
            aliases: Vec::new(),
            adapters: Vec::new(),
            overlap: Overlap::default(),
            check: MergeCheck::default(),
            made: Mutex::default(),
        }
        .with_adapter("default", token_ids, rows)
    }

    /// Merges another adapter together with those before. A name that is taken is an error when the tensor is asked for,
    /// as is a token that two of them train; see [`with_overlap`](Self::with_overlap).
    #[must_use]
    pub fn with_adapter(mut self, name: &str, token_ids: &[u32], rows: TokenRows) -> Self {
        self.adapters.push(Adapter {
            name: name.to_owned(),
            token_ids: token_ids.to_vec(),
            rows,
        });
        self
    }

    /// Sets what counts for tokens that several adapters train.
    #[must_use]
    pub fn with_overlap(mut self, overlap: Overlap) -> Self {
        self.overlap = overlap;
        self
    }

    /// Sets what is checked of the rows when the tensor is asked for.
    #[must_use]
    pub fn with_check(mut self, check: MergeCheck) -> Self {
        self.check = check;
        self
    }

    /// Serves the merged tensor under another name too: a tied checkpoint lacks the `lm_head.weight` that some models
    /// ask for.
    #[must_use]
    pub fn with_alias(mut self, alias: &str) -> Self {
        self.aliases.push(alias.to_owned());
        self
    }

    fn is_merged(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }

    /// The merged tensor, made by `load` unless it was made before in the same type and place.
    fn merged(&self, dtype: DType, device: &Device, load: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |tensor: &&Tensor| tensor.dtype() == dtype && tensor.device().same_device(device);
        if let Some(tensor) = made.as_ref().filter(fits) {
            return Ok(tensor.clone());
        }
        // The inner source may hand out storage that others share.
        let copy = load()?.detach().force_contiguous()?;
        let mut layer = TrainableTokens::frozen(copy)?;
        for Adapter {
            name,
            token_ids,
            rows,
        } in &self.adapters
        {
            layer.add_adapter_with_rows(name, token_ids, rows)?;
        }
        let names: Vec<_> = self.adapters.iter().map(|adapter| &*adapter.name).collect();
        layer.merge_adapters(&names, &self.overlap, self.check)?;
        Ok(made.insert(layer.table().tensor().clone()).clone())
    }
}

impl SimpleBackend for MergedBackend<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.is_merged(name) {
            return self.inner.get(shape, name, init, dtype, device);
        }
        let load = || self.inner.get(shape.clone(), &self.name, init, dtype, device);
        let tensor = self.merged(dtype, device, load)?;
        if tensor.shape() != &shape {
            return Err(
                crate::Error::from(CoreError::shape("merged weight", shape.dims(), tensor.dims())).into(),
            );
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.is_merged(name) {
            return self.inner.get_unchecked(name, dtype, device);
        }
        self.merged(dtype, device, || {
            self.inner.get_unchecked(&self.name, dtype, device)
        })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        if self.is_merged(name) {
            return self.inner.contains_tensor(&self.name);
        }
        self.inner.contains_tensor(name)
    }
}

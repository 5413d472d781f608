//! The compact table as the answer to a request for the whole one.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;

use trainable_tokens_core::Error as CoreError;

use crate::convert::core_dtype;
use crate::var_builder::wrapped::Wrapped;

/// Serves a compact table under one name and passes all other requests on.
pub(super) struct Served<'a> {
    inner: Wrapped<'a>,
    name: String,
    table: Tensor,
    vocab_size: usize,
}

impl<'a> Served<'a> {
    pub(super) fn new(inner: Wrapped<'a>, name: &str, table: Tensor, vocab_size: usize) -> Self {
        Self {
            inner,
            name: name.to_owned(),
            table,
            vocab_size,
        }
    }

    /// The table itself: a conversion or a copy would miss later updates.
    fn serve(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let what = "compact table";
        if dtype != self.table.dtype() {
            let (expected, got) = (core_dtype(what, dtype)?, core_dtype(what, self.table.dtype())?);
            let error = trainable_tokens_core::Error::DType { what, expected, got };
            return Err(crate::Error::Core(error).into());
        }
        if !device.same_device(self.table.device()) {
            let (expected, got) = (device.location(), self.table.device().location());
            return Err(crate::Error::Device { what, expected, got }.into());
        }
        Ok(self.table.clone())
    }
}

impl SimpleBackend for Served<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if name != self.name {
            return self.inner.get(shape, name, init, dtype, device);
        }
        let whole = [self.vocab_size, self.table.dims()[1]];
        if shape.dims() != whole {
            return Err(crate::Error::from(CoreError::shape("embedding table", &whole, shape.dims())).into());
        }
        self.serve(dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        if name != self.name {
            return self.inner.get_unchecked(name, dtype, device);
        }
        self.serve(dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        name == self.name || self.inner.contains_tensor(name)
    }
}

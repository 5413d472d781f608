//! A variable builder as the source of another.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

/// Passes requests on to a builder, below its prefix.
pub(super) struct Wrapped<'a>(pub(super) VarBuilder<'a>);

impl SimpleBackend for Wrapped<'_> {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0
            .get_with_hints_dtype(shape, name, init, dtype)?
            .to_device(device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.get_unchecked_dtype(name, dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

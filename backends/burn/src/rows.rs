//! The trained rows.

use burn::module::{Param, Parameter};
use burn::tensor::{Device, Tensor};
use trainable_tokens_core::{DType, DeltaStore, TokenRows};

use crate::convert::{core_dtype, to_rows, to_tensor};
use crate::{Error, Result};

/// The trained rows `[k, D]` in a burn [`Param`]: a real leaf of burn's graph on an autodiff device.
///
/// Burn's parameters are values: what is written here is not seen by clones of the parameter made before.
#[derive(Debug)]
pub struct BurnDelta {
    param: Param<Tensor<2>>,
    dtype: DType,
}

impl BurnDelta {
    /// Makes a parameter of `rows` on `device`, bit for bit, in their own element type.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the device cannot compute in the rows' element type.
    pub fn new(rows: &TokenRows, device: &Device) -> Result<Self> {
        let param = Param::from_tensor(to_tensor("trained rows", rows, device)?);
        let dtype = rows.dtype();
        Ok(Self { param, dtype })
    }

    /// Wraps a parameter of shape `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::ElementType`] unless its elements are F64, F32, F16 or BF16.
    pub fn from_param(param: Param<Tensor<2>>) -> Result<Self> {
        let dtype = core_dtype("trained rows", param.base().dtype())?;
        Ok(Self { param, dtype })
    }

    /// The parameter itself.
    pub fn param(&self) -> &Param<Tensor<2>> {
        &self.param
    }

    /// Gives up the wrapper for its parameter, as it is now.
    pub fn into_param(self) -> Param<Tensor<2>> {
        self.param
    }
}

impl DeltaStore for BurnDelta {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.param.base().dims()[0]
    }

    fn embedding_dim(&self) -> usize {
        self.param.base().dims()[1]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read(&self) -> Result<TokenRows> {
        to_rows("trained rows", self.param.val())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.check_write(rows)?;
        let old = self.param.base();
        let new = to_tensor("trained rows", rows, &old.device())?;
        let new = Parameter::set_require_grad(new, old.is_require_grad());
        self.param = self.param.clone().map(|_| new);
        Ok(())
    }
}

//! The trained rows.

use burn::module::{Param, Parameter};
use burn::tensor::{Device, Tensor};
use trainable_tokens_core::{DType, DeltaStore, RowMix, TokenRows};

use crate::convert::{core_dtype, into_tensor, to_rows, to_tensor};
use crate::ops::combine;
use crate::{Error, Result};

/// The trained rows `[k, D]` in a burn [`Param`]: a real leaf of burn's graph on an autodiff device.
///
/// Burn's parameters are values: what is written here is not seen by clones of the parameter made before.
///
/// [`Backend::combine`](trainable_tokens_core::Backend::combine) makes one of several: a node of their graph, that is no
/// parameter, cannot be written and has no gradient of its own.
#[derive(Debug)]
pub struct BurnDelta {
    rows: Rows,
    dtype: DType,
}

#[derive(Debug)]
enum Rows {
    Leaf(Param<Tensor<2>>),
    Combined(Tensor<2>),
}

impl BurnDelta {
    /// Makes a parameter of `rows` on `device`, bit for bit, in their own element type.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the device cannot compute in the rows' element type.
    pub fn new(rows: &TokenRows, device: &Device) -> Result<Self> {
        let param = Param::from_tensor(to_tensor("trained rows", rows, device)?);
        Self::from_param(param)
    }

    /// Wraps a parameter of shape `[k, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::ElementType`] unless its elements are F64, F32, F16 or BF16.
    pub fn from_param(param: Param<Tensor<2>>) -> Result<Self> {
        let dtype = core_dtype("trained rows", param.base().dtype())?;
        let rows = Rows::Leaf(param);
        Ok(Self { rows, dtype })
    }

    /// Makes rows of those of parameters.
    pub(crate) fn combine(parts: &[&Self], mix: &RowMix) -> Result<Self> {
        let params = parts.iter().map(|part| part.param());
        let params = params.collect::<Result<Vec<_>>>()?;
        let tensors = params.iter().map(|param| param.val());
        let dtype = mix.dtype(parts.iter().map(|part| part.dtype));
        let rows = Rows::Combined(combine(tensors.collect(), mix, dtype)?);
        Ok(Self { rows, dtype })
    }

    /// The rows, as a node of burn's graph.
    pub fn tensor(&self) -> Tensor<2> {
        match &self.rows {
            Rows::Leaf(param) => param.val(),
            Rows::Combined(rows) => rows.clone(),
        }
    }

    /// The parameter itself.
    ///
    /// # Errors
    ///
    /// [`Error::Combination`].
    pub fn param(&self) -> Result<&Param<Tensor<2>>> {
        match &self.rows {
            Rows::Leaf(param) => Ok(param),
            Rows::Combined(_) => Err(Error::Combination),
        }
    }

    /// Gives up the wrapper for its parameter, as it is now.
    ///
    /// # Errors
    ///
    /// [`Error::Combination`].
    pub fn into_param(self) -> Result<Param<Tensor<2>>> {
        match self.rows {
            Rows::Leaf(param) => Ok(param),
            Rows::Combined(_) => Err(Error::Combination),
        }
    }

    fn dims(&self) -> [usize; 2] {
        match &self.rows {
            Rows::Leaf(param) => param.base().dims(),
            Rows::Combined(rows) => rows.dims(),
        }
    }
}

impl DeltaStore for BurnDelta {
    type Error = Error;

    fn num_rows(&self) -> usize {
        self.dims()[0]
    }

    fn embedding_dim(&self) -> usize {
        self.dims()[1]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read(&self) -> Result<TokenRows> {
        to_rows("trained rows", self.tensor())
    }

    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.check_write(rows)?;
        self.replace(rows.clone())
    }

    fn update(
        &mut self,
        change: &mut dyn FnMut(&mut TokenRows) -> trainable_tokens_core::Result<()>,
    ) -> Result<()> {
        self.param()?;
        let mut rows = self.read()?;
        change(&mut rows)?;
        self.check_write(&rows)?;
        self.replace(rows)
    }
}

impl BurnDelta {
    /// Replaces the rows by others of the same shape and type.
    fn replace(&mut self, rows: TokenRows) -> Result<()> {
        let param = self.param()?;
        let old = param.base();
        let new = into_tensor("trained rows", rows, &old.device())?;
        let new = Parameter::set_require_grad(new, old.is_require_grad());
        self.rows = Rows::Leaf(param.clone().map(|_| new));
        Ok(())
    }
}

//! A linear layer that is never trained.

use candle_core::Tensor;
use candle_nn::Module;

use trainable_tokens_core::{CrossEntropyOptions, CrossEntropyPlan, Error as CoreError};

use crate::convert::core_dtype;
use crate::ids::read_labels;
use crate::ops::{Passes, check_input, linear_cross_entropy, project};
use crate::{Error, Result};

/// `x · Wᵀ + b` with a gradient for `x` only.
///
/// Candle's own [`candle_nn::Linear`] makes a gradient as large as its weight in every backward pass, frozen or
/// not. Through this layer gradients flow to the input and neither weight nor bias gets one, which saves a third
/// of the work and all of that memory. The output equals candle's bit for bit.
///
/// The weight is never copied. On the CPU, where candle would widen a whole bf16 weight for each product, rows are
/// widened a few at a time, and gradients of half types are summed in `f32`.
#[derive(Clone, Debug)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Wraps a weight `[out_features, in_features]` and a bias `[out_features]`, detached.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] or a shape error if they do not fit, [`Error::ElementType`] unless the weight is F64, F32,
    /// F16 or BF16, [`Error::NotContiguous`] for a strided weight, [`Error::Device`] and a type error if the bias
    /// is not like the weight.
    #[expect(clippy::needless_pass_by_value, reason = "the layer takes the weight's place")]
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let what = "weight";
        if weight.rank() != 2 {
            let (expected, got) = ("[out_features, in_features]", weight.dims().to_vec());
            return Err(Error::Rank { what, expected, got });
        }
        core_dtype(what, weight.dtype())?;
        if !weight.is_contiguous() {
            return Err(Error::NotContiguous { what });
        }
        let bias = bias.map(|bias| check_bias(&bias, &weight)).transpose()?;
        let weight = weight.detach();
        Ok(Self { weight, bias })
    }

    /// The weight, `[out_features, in_features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[out_features]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The cross-entropy `[]` of the outputs for `x` `[.., in_features]` and `labels` `[..]`, as that of
    /// [`TiedHead::cross_entropy`](crate::TiedHead::cross_entropy): for heads of which no row trains.
    ///
    /// # Errors
    ///
    /// When shape, element type or device are not the weight's; [`CoreError::LabelOutOfRange`]; [`CoreError::AllIgnored`]
    /// for the mean over no label; when candle fails.
    pub fn cross_entropy(&self, x: &Tensor, labels: &Tensor, options: CrossEntropyOptions) -> Result<Tensor> {
        self.loss(x, labels, options, Passes::Both)
    }

    /// As [`cross_entropy`](Self::cross_entropy), but detached: at less than half of the cost, for evaluation.
    ///
    /// # Errors
    ///
    /// Those of [`cross_entropy`](Self::cross_entropy).
    pub fn evaluate_cross_entropy(
        &self,
        x: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
    ) -> Result<Tensor> {
        self.loss(x, labels, options, Passes::Forward)
    }

    fn loss(
        &self,
        x: &Tensor,
        labels: &Tensor,
        options: CrossEntropyOptions,
        passes: Passes,
    ) -> Result<Tensor> {
        let labels = read_labels(labels, check_input(x, &self.weight)?)?;
        let plan = CrossEntropyPlan::new(&labels, self.weight.dims()[0], options)?;
        let bias = self.bias.as_ref();
        linear_cross_entropy(x, &self.weight, bias, None, &plan, passes)
    }
}

impl Module for FrozenLinear {
    /// `[.., in_features]` to `[.., out_features]`, for any leading dimensions and layout.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(project(x, &self.weight, self.bias.as_ref(), None)?)
    }
}

/// Makes sure that a bias fits the weight, and detaches it.
pub(crate) fn check_bias(bias: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let what = "bias";
    if bias.dims() != &weight.dims()[..1] {
        return Err(CoreError::shape(what, &weight.dims()[..1], bias.dims()).into());
    }
    let (expected, got) = (
        core_dtype("weight", weight.dtype())?,
        core_dtype(what, bias.dtype())?,
    );
    if expected != got {
        return Err(trainable_tokens_core::Error::DType { what, expected, got }.into());
    }
    if !bias.device().same_device(weight.device()) {
        return Err(Error::Device {
            what,
            expected: weight.device().location(),
            got: bias.device().location(),
        });
    }
    Ok(bias.detach().contiguous()?)
}

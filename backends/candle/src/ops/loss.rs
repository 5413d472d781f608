//! The cross-entropy of a projection on a frozen weight, without a matrix of all logits.
//!
//! Loss and gradients are computed together, chunk by chunk, before the node of the graph is made; its backward pass
//! multiplies the gradients by the upstream one.

mod cpu;
mod device;
#[cfg(test)]
mod tests;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, DType, Device, Layout, MetalStorage, Result, Shape, Tensor,
};
use trainable_tokens_core::CrossEntropyPlan;

use super::storage::DeviceStorage;
use super::{Overrides, cast, check_input};

/// Which passes a loss is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passes {
    /// Forward alone: no gradient is computed.
    Forward,
    /// Forward and backward.
    Both,
}

/// A weight, its bias and the rows that override some of its own.
struct Projection<'a> {
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    overrides: Option<&'a Overrides>,
}

/// What to compute besides the loss.
#[derive(Clone, Copy)]
struct Wanted {
    of_hidden: bool,
    of_delta: bool,
}

/// The loss and its gradients, in the compute type.
struct Computed {
    /// `[]`.
    loss: Tensor,
    /// `[N, D]`, zeros where the label is ignored.
    of_hidden: Option<Tensor>,
    /// `[k, D]`.
    of_delta: Option<Tensor>,
}

/// The loss `[]` of `hidden` `[.., D]` over the detached weight `[V, D]` and the detached bias `[V]`, in the compute type of
/// theirs. Gradients go to `hidden` and to the overriding rows.
///
/// # Errors
///
/// When the hidden states do not fit weight and plan, and when candle fails.
pub(crate) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    overrides: Option<&Overrides>,
    plan: &CrossEntropyPlan,
    passes: Passes,
) -> crate::Result<Tensor> {
    let dim = weight.dims2()?.1;
    let rows = check_input(hidden, weight)?.iter().product();
    plan.expect_hidden([rows, dim], dim)?;
    let hidden = hidden.reshape((rows, dim))?;
    let delta = overrides.map(|overrides| &overrides.delta);
    let both = passes == Passes::Both;
    let wanted = Wanted {
        of_hidden: both && hidden.track_op(),
        of_delta: both && delta.is_some_and(Tensor::track_op),
    };
    let projection = Projection {
        weight,
        bias,
        overrides,
    };
    let flat = hidden.detach().contiguous()?;
    let computed = match hidden.device() {
        Device::Cpu => cpu::compute(&flat, &projection, plan, wanted)?,
        _ => device::compute(&flat, &projection, plan, wanted)?,
    };
    Ok(match (wanted, delta) {
        (Wanted { of_delta: true, .. }, Some(delta)) => hidden.apply_op2(delta, computed)?,
        (Wanted { of_hidden: true, .. }, _) => hidden.apply_op1(computed)?,
        _ => computed.loss,
    })
}

impl Computed {
    fn loss<S: DeviceStorage>(&self) -> Result<(S, Shape)> {
        let (loss, layout) = self.loss.storage_and_layout();
        Ok((S::of(&loss)?.try_clone(layout)?, Shape::from(())))
    }
}

/// The gradient of the result times that of the loss, in the type of what it is for.
fn chain(gradient: Option<&Tensor>, upstream: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let times = |gradient: &Tensor| cast(&gradient.broadcast_mul(&upstream.detach())?, dtype);
    gradient.map(times).transpose()
}

const NAME: &str = "linear-cross-entropy";

/// The loss as an operation on the hidden states.
impl CustomOp1 for Computed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.loss()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.loss()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.loss()
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        chain(self.of_hidden.as_ref(), upstream, hidden.dtype())
    }
}

/// The loss as an operation on the hidden states and the trained rows.
impl CustomOp2 for Computed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.loss()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.loss()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.loss()
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        delta: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_hidden = chain(self.of_hidden.as_ref(), upstream, hidden.dtype())?;
        Ok((of_hidden, chain(self.of_delta.as_ref(), upstream, delta.dtype())?))
    }
}

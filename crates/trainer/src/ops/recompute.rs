//! Blocks whose activations are computed again in the backward pass instead of kept (Chen et al. 2016).

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, MetalStorage, Result, Shape, Storage, Tensor, Var,
    bail,
};

use super::storage::{cpu, cuda, metal};

/// Part of a model: a function of its input, and of leaves of the graph that it holds.
pub(crate) type Block = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// `block(x)`, with nothing kept for the backward pass but `x`. Gradients go to `x` and to `leaves`, which must be all
/// that train inside the block, in one element type.
pub(crate) fn recompute(x: &Tensor, leaves: &[Tensor], block: Block) -> Result<Tensor> {
    let out = block(&x.detach())?.detach();
    if !x.track_op() && leaves.is_empty() {
        return Ok(out);
    }
    let operation = Recompute {
        block,
        leaves: leaves.to_vec(),
        out: Mutex::new(Some(out)),
    };
    if leaves.is_empty() {
        return x.apply_op1(operation);
    }
    x.apply_op2(&in_one(leaves)?, operation)
}

/// Puts tensors one after the other.
fn in_one(tensors: &[Tensor]) -> Result<Tensor> {
    let flat: Result<Vec<Tensor>> = tensors.iter().map(Tensor::flatten_all).collect();
    Tensor::cat(&flat?, 0)
}

struct Recompute {
    block: Block,
    leaves: Vec<Tensor>,
    /// The result, until the forward pass has copied it.
    out: Mutex<Option<Tensor>>,
}

impl Recompute {
    fn forward<S: BackendStorage>(&self, storage_of: fn(&Storage) -> Option<&S>) -> Result<(S, Shape)> {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(out) = out else {
            bail!("a block's operation ran twice");
        };
        let out = out.force_contiguous()?;
        let (storage, layout) = out.storage_and_layout();
        match storage_of(&storage) {
            Some(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            None => bail!("a block's result lies on another device than its input"),
        }
    }

    /// The gradients of the input and of the leaves.
    fn gradients(&self, x: &Tensor, upstream: &Tensor) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let x = Var::from_tensor(&x.detach())?;
        // The slopes of this sum are those of the block, weighted.
        let weighted = ((self.block)(x.as_tensor())? * upstream.detach())?.sum_all()?;
        let mut gradients = weighted.backward()?;
        let of_leaf = |leaf: &Tensor| gradients.get(leaf).cloned().map_or_else(|| leaf.zeros_like(), Ok);
        let of_leaves = self.leaves.iter().map(of_leaf).collect::<Result<_>>()?;
        Ok((gradients.remove(x.as_tensor()), of_leaves))
    }
}

const NAME: &str = "recompute";

/// A block without leaves.
impl CustomOp1 for Recompute {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(cpu)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(cuda)
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(metal)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(x, upstream)?.0)
    }
}

/// A block and its leaves, put one after the other.
impl CustomOp2 for Recompute {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(cpu)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward(cuda)
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.forward(metal)
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (of_x, of_leaves) = self.gradients(x, upstream)?;
        Ok((of_x, Some(in_one(&of_leaves)?)))
    }
}

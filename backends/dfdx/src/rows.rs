//! The trained rows.

use dfdx::optim::{Optimizer, OptimizerUpdateError, Sgd, SgdConfig, UnusedTensors};
use dfdx::shapes::{HasShape, Rank2, Shape};
use dfdx::tensor::{Cpu, Gradients, Tensor};
use dfdx::tensor_ops::RealizeTo;
use trainable_tokens_core::{DType, DeltaStore, Error as CoreError, TokenRows};

use crate::convert::{dims, matrix, to_elements, to_rows, to_vec};
use crate::ops::{Flag, Leaf, zero_gradient};
use crate::{DfdxDevice, DfdxElement, Error, Result};

/// The trained rows `[k, D]` as a leaf of dfdx's graph.
///
/// All tensors of one graph of dfdx have one element type, so the leaf has the table's. Rows that train in another
/// type (`f32` over a table of `f16`) are kept on the host, and the leaf holds them rounded, as the table would. Their
/// gradient is summed in `f32` all the same: two elements of `f16` carry the bits of each sum through dfdx's gradients.
/// (On CUDA, where bits cannot be taken apart, each sum is rounded, as torch's are.)
///
/// A clone is copied on write: neither sees what is written to the other later, although both have one gradient.
#[derive(Clone, Debug)]
pub struct DfdxDelta<E: DfdxElement, D: DfdxDevice<E> = Cpu> {
    leaf: Leaf<E, D>,
    reached: Flag<E, D>,
    /// The rows themselves, where the leaf cannot hold them.
    master: Option<TokenRows>,
}

impl<E: DfdxElement, D: DfdxDevice<E>> DfdxDelta<E, D> {
    /// Makes a leaf of `rows` on `device`; the rows keep their own element type.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn new(rows: &TokenRows, device: &D) -> Result<Self> {
        let [num_rows, dim] = rows.shape();
        let reached: Flag<E, D> = device.try_zeros().map_err(Error::dfdx)?;
        let sums = || {
            let width = dim * E::WIDTH;
            matrix(device, vec![E::default(); num_rows * width], num_rows, width)
        };
        Ok(Self {
            leaf: Leaf {
                rows: matrix(device, to_elements("trained rows", rows)?, num_rows, dim)?,
                reached: Some(reached.clone()),
                sums: (D::WIDE_SUMS && E::WIDTH > 1).then(sums).transpose()?,
            },
            reached,
            master: (rows.dtype() != E::DTYPE).then(|| rows.clone()),
        })
    }

    /// The leaf: the rows in the table's element type.
    pub fn tensor(&self) -> &Tensor<(usize, usize), E, D> {
        &self.leaf.rows
    }

    /// The leaf at sizes known at compile time, which dfdx's optimizers ask for. It shares the rows' identity and
    /// storage; changing it changes a copy.
    ///
    /// # Errors
    ///
    /// [`trainable_tokens_core::Error::Shape`] unless the rows are `[K, M]`.
    pub fn to_const<const K: usize, const M: usize>(&self) -> Result<Tensor<Rank2<K, M>, E, D>> {
        let got = dims(&self.leaf.rows);
        let leaf = self.leaf.rows.clone().try_realize::<Rank2<K, M>>();
        leaf.map_err(|_| CoreError::shape("trained rows", &[K, M], &got).into())
    }

    /// Gradients for a tape, in which those of the rows outlive a backward pass and all others do not: dfdx's
    /// `ZeroGrads::alloc_grads` for rows whose sizes are known at runtime.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn alloc_grads(&self) -> Result<Gradients<E, D>> {
        let mut gradients = Gradients::leaky();
        self.zero_grads(&mut gradients)?;
        Ok(gradients)
    }

    /// Zeroes the gradient of the rows and lets it outlive backward passes: dfdx's `ZeroGrads::zero_grads`. Call it
    /// also on the `alloc_grads()` of a module that trains together with the rows.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn zero_grads(&self, gradients: &mut Gradients<E, D>) -> Result<()> {
        let mut leafs = UnusedTensors::default();
        zero_gradient(gradients, &self.reached).map_err(Error::dfdx)?;
        leafs.add(&self.reached);
        for tensor in [Some(&self.leaf.rows), self.leaf.sums.as_ref()]
            .into_iter()
            .flatten()
        {
            zero_gradient(gradients, tensor).map_err(Error::dfdx)?;
            leafs.add(tensor);
        }
        gradients.retain_leafs(&leafs.ids);
        Ok(())
    }

    pub(crate) fn as_leaf(&self) -> &Leaf<E, D> {
        &self.leaf
    }

    /// The gradient of the rows in the type that sums run in, if a backward pass reached them.
    pub(crate) fn gradient(&self, gradients: &Gradients<E, D>) -> Result<Option<TokenRows>> {
        if !is_present(gradients, &self.reached)? || to_vec(&gradients.get(&self.reached)) == [E::default()] {
            return Ok(None);
        }
        // Whatever marks the flag allocates these, too: they cannot be missing.
        let sums = match &self.leaf.sums {
            Some(sums) => E::read_sums(&to_vec(&gradients.get(sums))),
            None => to_vec(&gradients.get(&self.leaf.rows))
                .into_iter()
                .map(E::to_compute)
                .collect(),
        };
        Ok(Some(TokenRows::new(sums, self.num_rows(), self.embedding_dim())?))
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> DeltaStore for DfdxDelta<E, D> {
    type Error = Error;

    fn num_rows(&self) -> usize {
        dims(&self.leaf.rows)[0]
    }

    fn embedding_dim(&self) -> usize {
        dims(&self.leaf.rows)[1]
    }

    fn dtype(&self) -> DType {
        self.master.as_ref().map_or(E::DTYPE, TokenRows::dtype)
    }

    fn read(&self) -> Result<TokenRows> {
        match &self.master {
            Some(rows) => Ok(rows.clone()),
            None => to_rows(&self.leaf.rows),
        }
    }

    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.check_write(rows)?;
        if self.leaf.rows.shape().num_elements() > 0 {
            self.leaf.rows.copy_from(&to_elements("trained rows", rows)?);
        }
        if let Some(master) = &mut self.master {
            master.clone_from(rows);
        }
        Ok(())
    }
}

/// Whether there is a gradient for `flag`. dfdx's `get` panics without one; its optimizers look first.
fn is_present<E: DfdxElement, D: DfdxDevice<E>>(
    gradients: &Gradients<E, D>,
    flag: &Flag<E, D>,
) -> Result<bool> {
    let mut probe = flag.clone();
    let standstill = SgdConfig {
        lr: 0.0,
        momentum: None,
        weight_decay: None,
    };
    match Sgd::new(&probe, standstill).update(&mut probe, gradients) {
        Ok(()) => Ok(true),
        Err(OptimizerUpdateError::UnusedParams(_)) => Ok(false),
        Err(OptimizerUpdateError::DeviceError(error)) => Err(Error::dfdx(error)),
    }
}

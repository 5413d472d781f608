//! The trained rows.

use std::sync::Arc;

use dfdx::optim::{Optimizer, OptimizerUpdateError, Sgd, SgdConfig, UnusedTensors};
use dfdx::shapes::{HasShape, Rank2, Shape};
use dfdx::tensor::{Cpu, Gradients, Tensor};
use dfdx::tensor_ops::RealizeTo;
use trainable_tokens_core::{DType, DeltaStore, Error as CoreError, RowMix, TokenRows};

use crate::convert::{Matrix, dims, matrix, to_elements, to_rows, to_vec};
use crate::ops::{Combined, Flag, Leaf, NewRows, zero_gradient};
use crate::{DfdxDevice, DfdxElement, Error, Result};

/// The trained rows `[k, D]` as a leaf of dfdx's graph.
///
/// All tensors of one graph of dfdx have one element type, so the leaf has the table's. Rows that train in another
/// type (`f32` over a table of `f16`) are kept on the host, and the leaf holds them rounded, as the table would. Their
/// gradient is summed in `f32` all the same: two elements of `f16` carry the bits of each sum through dfdx's gradients.
/// (On CUDA, where bits cannot be taken apart, each sum is rounded, as torch's are.)
///
/// A clone is copied on write: neither sees what is written to the other later, although both have one gradient.
///
/// [`Backend::combine`](trainable_tokens_core::Backend::combine) makes one of several: its rows are made on the host, and
/// their gradient goes to the leaves that they were made of. It is no leaf, so it cannot be written and has no gradient.
#[derive(Clone, Debug)]
pub struct DfdxDelta<E: DfdxElement, D: DfdxDevice<E> = Cpu> {
    rows: NewRows<E, D>,
    /// The rows themselves, where a tensor of the table's element type cannot hold them.
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
        let sums = || {
            let width = dim * E::WIDTH;
            matrix(device, vec![E::default(); num_rows * width], num_rows, width)
        };
        let leaf = Leaf {
            rows: to_tensor(rows, device)?,
            reached: Some(device.try_zeros().map_err(Error::dfdx)?),
            sums: (D::WIDE_SUMS && E::WIDTH > 1).then(sums).transpose()?,
        };
        Ok(Self {
            rows: NewRows::Leaf(leaf),
            master: master::<E>(rows),
        })
    }

    /// Makes rows of those of leaves.
    pub(crate) fn combine(parts: &[&Self], mix: &RowMix) -> Result<Self> {
        let leaf = |part: &&Self| Ok(part.leaf("combining rows")?.clone());
        let leaves = parts.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        let rows = parts.iter().map(|part| part.read());
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let rows = mix.apply(&rows.iter().collect::<Vec<_>>())?;
        let first = leaves.first();
        let device = first.ok_or_else(|| CoreError::shape("rows to combine", &[1], &[0]))?;
        let combined = Combined {
            rows: to_tensor(&rows, device.rows.device())?,
            leaves,
            mix: mix.clone(),
        };
        Ok(Self {
            rows: NewRows::Combined(Arc::new(combined)),
            master: master::<E>(&rows),
        })
    }

    /// The rows in the table's element type: the leaf, unless they are a combination of several.
    pub fn tensor(&self) -> &Tensor<(usize, usize), E, D> {
        self.rows.tensor()
    }

    /// The leaf at sizes known at compile time, which dfdx's optimizers ask for. It shares the rows' identity and
    /// storage; changing it changes a copy.
    ///
    /// # Errors
    ///
    /// [`trainable_tokens_core::Error::Shape`] unless the rows are `[K, M]`; [`Error::Unsupported`] for a combination.
    pub fn to_const<const K: usize, const M: usize>(&self) -> Result<Tensor<Rank2<K, M>, E, D>> {
        let leaf = &self.leaf("training rows as a tensor of dfdx")?.rows;
        let got = dims(leaf);
        let leaf = leaf.clone().try_realize::<Rank2<K, M>>();
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
    /// also on the `alloc_grads()` of a module that trains together with the rows. For a combination these are the
    /// gradients of the leaves that it is made of.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn zero_grads(&self, gradients: &mut Gradients<E, D>) -> Result<()> {
        let mut kept = UnusedTensors::default();
        for leaf in self.rows.leaves() {
            if let Some(reached) = &leaf.reached {
                zero_gradient(gradients, reached).map_err(Error::dfdx)?;
                kept.add(reached);
            }
            for tensor in [Some(&leaf.rows), leaf.sums.as_ref()].into_iter().flatten() {
                zero_gradient(gradients, tensor).map_err(Error::dfdx)?;
                kept.add(tensor);
            }
        }
        gradients.retain_leafs(&kept.ids);
        Ok(())
    }

    pub(crate) fn new_rows(&self) -> &NewRows<E, D> {
        &self.rows
    }

    /// The gradient of the rows in the type that sums run in, if a backward pass reached them.
    pub(crate) fn gradient(&self, gradients: &Gradients<E, D>) -> Result<Option<TokenRows>> {
        let NewRows::Leaf(leaf) = &self.rows else {
            return Ok(None);
        };
        let Some(reached) = &leaf.reached else {
            return Ok(None);
        };
        if !is_present(gradients, reached)? || to_vec(&gradients.get(reached)) == [E::default()] {
            return Ok(None);
        }
        // Whatever marks the flag allocates these, too: they cannot be missing.
        let sums = match &leaf.sums {
            Some(sums) => E::read_sums(&to_vec(&gradients.get(sums))),
            None => to_vec(&gradients.get(&leaf.rows))
                .into_iter()
                .map(E::to_compute)
                .collect(),
        };
        Ok(Some(TokenRows::new(sums, self.num_rows(), self.embedding_dim())?))
    }

    fn leaf(&self, what: &'static str) -> Result<&Leaf<E, D>> {
        match &self.rows {
            NewRows::Leaf(leaf) => Ok(leaf),
            NewRows::Combined(_) => Err(combination(what)),
        }
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> DeltaStore for DfdxDelta<E, D> {
    type Error = Error;

    fn num_rows(&self) -> usize {
        dims(self.tensor())[0]
    }

    fn embedding_dim(&self) -> usize {
        dims(self.tensor())[1]
    }

    fn dtype(&self) -> DType {
        self.master.as_ref().map_or(E::DTYPE, TokenRows::dtype)
    }

    fn read(&self) -> Result<TokenRows> {
        match &self.master {
            Some(rows) => Ok(rows.clone()),
            None => to_rows(self.tensor()),
        }
    }

    fn write(&mut self, rows: &TokenRows) -> Result<()> {
        self.check_write(rows)?;
        let NewRows::Leaf(leaf) = &mut self.rows else {
            return Err(combination("writing rows"));
        };
        if leaf.rows.shape().num_elements() > 0 {
            leaf.rows.copy_from(&to_elements("trained rows", rows)?);
        }
        if let Some(master) = &mut self.master {
            master.clone_from(rows);
        }
        Ok(())
    }
}

/// The rows as tables of the element type `E` hold them.
fn to_tensor<E: DfdxElement, D: DfdxDevice<E>>(rows: &TokenRows, device: &D) -> Result<Matrix<E, D>> {
    let [num_rows, dim] = rows.shape();
    let elements = to_elements("trained rows", rows)?;
    matrix(device, elements.into_owned(), num_rows, dim)
}

/// The rows themselves, if a tensor of the element type `E` cannot hold them.
fn master<E: DfdxElement>(rows: &TokenRows) -> Option<TokenRows> {
    (rows.dtype() != E::DTYPE).then(|| rows.clone())
}

fn combination(what: &'static str) -> Error {
    Error::Unsupported {
        what,
        why: "they are a combination of several adapters' rows; use those of each adapter",
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

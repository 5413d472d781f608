//! The rows that replace some of a table's, and where their gradients go.

use std::sync::Arc;

use dfdx::tensor::{Gradients, Storage};
use trainable_tokens_core::RowMix;

use super::{Flag, Kernels, mark};
use crate::DfdxElement;
use crate::convert::Matrix;

/// Trained rows in dfdx's graph, and what their gradients come to.
#[derive(Clone, Debug)]
pub struct Leaf<E: DfdxElement, D: Storage<E>> {
    /// The rows `[k, D]`, in the table's element type. Their gradient is what dfdx's own optimizers see.
    pub(crate) rows: Matrix<E, D>,
    /// What a backward pass marks, where someone asks for it.
    pub(crate) reached: Option<Flag<E, D>>,
    /// A tensor in whose gradient, that of `rows` would be rounded, sums of the compute type gather bit for bit.
    pub(crate) sums: Option<Matrix<E, D>>,
}

/// Rows made of those of several leaves.
#[derive(Debug)]
pub struct Combined<E: DfdxElement, D: Storage<E>> {
    /// The rows, in the table's element type. They have no gradient of their own.
    pub(crate) rows: Matrix<E, D>,
    pub(crate) leaves: Vec<Leaf<E, D>>,
    /// How they are made, and how their gradient is divided among the leaves.
    pub(crate) mix: RowMix,
}

/// Rows that replace some of a table's.
#[derive(Clone, Debug)]
pub enum NewRows<E: DfdxElement, D: Storage<E>> {
    /// A leaf, which gets their gradient.
    Leaf(Leaf<E, D>),
    /// A combination of leaves, among which their gradient is divided.
    Combined(Arc<Combined<E, D>>),
}

impl<E: DfdxElement, D: Storage<E>> NewRows<E, D> {
    /// Rows of which nobody but dfdx wants the gradient.
    pub(crate) fn plain(rows: Matrix<E, D>) -> Self {
        let (reached, sums) = (None, None);
        Self::Leaf(Leaf { rows, reached, sums })
    }

    /// The rows, in the table's element type.
    pub(crate) fn tensor(&self) -> &Matrix<E, D> {
        match self {
            Self::Leaf(leaf) => &leaf.rows,
            Self::Combined(combined) => &combined.rows,
        }
    }

    /// The leaves that get the rows' gradient.
    pub(crate) fn leaves(&self) -> &[Leaf<E, D>] {
        match self {
            Self::Leaf(leaf) => std::slice::from_ref(leaf),
            Self::Combined(combined) => &combined.leaves,
        }
    }
}

impl<E: DfdxElement, D: Kernels<E>> NewRows<E, D> {
    /// Notes that a backward pass reached the rows, which then have a gradient, if only of zeros.
    pub(super) fn mark(&self, gradients: &mut Gradients<E, D>) -> Result<(), D::Err> {
        for leaf in self.leaves() {
            mark(gradients, leaf.reached.as_ref())?;
            if let Some(sums) = &leaf.sums {
                gradients.try_alloc_for(sums)?;
            }
            gradients.try_alloc_for(&leaf.rows)?;
        }
        Ok(())
    }
}

//! Backward passes, which a framework with automatic gradients has already.

use trainable_tokens_core::{DeltaStore, Element, EmbeddingSource, Error, LookupPlan, TokenRows, TokenSet};

use crate::backend::overridden;
use crate::{Matrix, Result, VecRows, VecTable};

/// What the backward passes of one step add up: the gradient of the trained rows, `[k, D]`, once one reached them.
#[derive(Clone, Debug, Default)]
pub struct Gradients(pub Option<TokenRows>);

impl Gradients {
    /// The backward pass of a lookup whose output has the gradient `upstream`, `[N, D]`. `delta` is the layer's
    /// `active()`, `scale` that of its `transform()`.
    ///
    /// # Errors
    ///
    /// For another shape.
    pub fn add_lookup<T: Element>(
        &mut self,
        delta: Option<&VecRows>,
        plan: &LookupPlan,
        upstream: &Matrix<T>,
        scale: Option<f64>,
    ) -> Result<()> {
        if let Some(delta) = delta {
            plan.accumulate(&upstream.rows.concat(), scale, self.of_rows::<T>(delta))?;
        }
        Ok(())
    }

    /// The backward pass of a head whose logits have the gradient `upstream`, `[N, V]`; returns the gradient of its
    /// hidden states, `[N, D]`. `delta` is the layer's `active()`.
    ///
    /// # Errors
    ///
    /// For another shape.
    pub fn add_head<T: Element>(
        &mut self,
        source: &VecTable<T>,
        delta: Option<&VecRows>,
        tokens: &TokenSet,
        hidden: &Matrix<T>,
        upstream: &Matrix<T>,
    ) -> Result<Matrix<T>> {
        let (n, dim) = (hidden.rows.len(), source.embedding_dim());
        hidden.expect_shape("hidden states", n, dim)?;
        upstream.expect_shape("gradient of the logits", n, source.vocab_size())?;
        if let Some(delta) = delta {
            let sums = self.of_rows::<T>(delta);
            let (what, expected, got) = ("gradient of the rows", T::Compute::DTYPE, sums.dtype());
            let sums = sums
                .as_mut_slice::<T::Compute>()
                .ok_or(Error::DType { what, expected, got })?;
            for (id, sum) in tokens.ids().iter().zip(sums.chunks_exact_mut(dim.max(1))) {
                for (hidden, upstream) in hidden.rows.iter().zip(&upstream.rows) {
                    add(sum, upstream[id.row()], hidden);
                }
            }
        }
        let mut sums = vec![vec![T::Compute::default(); dim]; n];
        for (id, weight) in overridden(source, delta, tokens) {
            for (sum, upstream) in sums.iter_mut().zip(&upstream.rows) {
                add(sum, upstream[id.row()], &weight);
            }
        }
        let round = |sum: Vec<T::Compute>| sum.into_iter().map(T::from_compute).collect();
        Matrix::new(sums.into_iter().map(round).collect(), dim)
    }

    /// The sum so far; zeros to begin with.
    fn of_rows<T: Element>(&mut self, delta: &VecRows) -> &mut TokenRows {
        let zeros = || TokenRows::zeros(T::Compute::DTYPE, delta.num_rows(), delta.embedding_dim());
        self.0.get_or_insert_with(zeros)
    }
}

/// `sum += factor * row`, in the compute type.
fn add<T: Element>(sum: &mut [T::Compute], factor: T, row: &[T]) {
    for (sum, x) in sum.iter_mut().zip(row) {
        *sum += factor.to_compute() * x.to_compute();
    }
}

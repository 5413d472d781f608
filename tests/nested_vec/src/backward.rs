//! Backward passes, which a framework with automatic gradients has already.

use trainable_tokens_core::{
    Backend, CrossEntropyPlan, Element, EmbeddingSource, LookupPlan, MixedPart, RowGradients, TokenAdapter,
    TokenRows, TokenSet,
};

use crate::backend::{logits_at, overridden};
use crate::{Matrix, NestedVec, Result, VecRows, VecTable};

/// What the backward passes of one step add up: the gradients of the trained rows.
#[derive(Clone, Debug, Default)]
pub struct Gradients(pub RowGradients);

impl Gradients {
    /// The backward pass of a lookup whose output has the gradient `upstream`, `[N, D]`. `delta` is the layer's
    /// `rows_for(plan)`, `scale` that of its `transform()`.
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
            let upstream = upstream.rows.concat();
            let add = |sums: &mut TokenRows| plan.accumulate(&upstream, scale, sums);
            self.0.add(&delta.0, T::Compute::DTYPE, add)?;
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
            self.0.add(&delta.0, T::Compute::DTYPE, |sums| {
                let sums = sums.as_mut_slice::<T::Compute>().unwrap_or_default();
                for (id, sum) in tokens.ids().iter().zip(sums.chunks_exact_mut(dim.max(1))) {
                    for (hidden, upstream) in hidden.rows.iter().zip(&upstream.rows) {
                        add(sum, upstream[id.row()], hidden);
                    }
                }
                Ok(())
            })?;
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

    /// The backward pass of a loss whose own gradient is `upstream`; returns the gradient of its hidden states, `[N, D]`,
    /// zeros where the label is ignored. `delta` is the layer's `active()`.
    ///
    /// # Errors
    ///
    /// For another shape.
    pub fn add_loss<T: Element>(
        &mut self,
        source: &VecTable<T>,
        delta: Option<&VecRows>,
        tokens: &TokenSet,
        hidden: &Matrix<T>,
        plan: &CrossEntropyPlan,
        upstream: f64,
    ) -> Result<Matrix<T>> {
        let (v, dim) = (source.vocab_size(), source.embedding_dim());
        plan.expect_hidden([hidden.num_rows(), hidden.columns], dim)?;
        if let Some(delta) = delta {
            self.0.add(&delta.0, T::Compute::DTYPE, |_| Ok(()))?;
        }
        let mut gradient = vec![vec![T::default(); dim]; hidden.num_rows()];
        for chunk in plan.chunks(size_of::<T::Compute>()) {
            let positions = &plan.positions()[chunk.clone()];
            let mut logits = logits_at(positions, hidden, source, delta, tokens);
            plan.differentiate(chunk, &mut logits, upstream, 1)?;
            // From here on it is a head with these rows alone.
            let upstream = logits
                .chunks_exact(v)
                .map(|row| row.iter().map(|x| T::from_compute(*x)).collect());
            let upstream = Matrix::new(upstream.collect(), v)?;
            let rows = positions.iter().map(|at| hidden.rows[*at as usize].clone());
            let rows = Matrix::new(rows.collect(), dim)?;
            let rows = self.add_head(source, delta, tokens, &rows, &upstream)?.rows;
            positions
                .iter()
                .zip(rows)
                .for_each(|(at, row)| gradient[*at as usize] = row);
        }
        Matrix::new(gradient, dim)
    }

    /// The backward pass of a head whose parts see the rows of different adapters, the layer's `mixed_parts`; otherwise as
    /// [`add_head`](Self::add_head).
    ///
    /// # Errors
    ///
    /// For another shape.
    pub fn add_mixed_head<T, B>(
        &mut self,
        source: &VecTable<T>,
        parts: &[MixedPart<'_, B>],
        hidden: &Matrix<T>,
        upstream: &Matrix<T>,
    ) -> Result<Matrix<T>>
    where
        T: Element,
        B: Backend<Delta: AsRef<VecRows>>,
    {
        let ranges: Vec<_> = parts.iter().map(|(rows, _)| rows.clone()).collect();
        let hidden = NestedVec::split_rows(hidden.clone(), &ranges)?;
        let upstream = NestedVec::split_rows(upstream.clone(), &ranges)?;
        let none = TokenSet::new([], source.vocab_size())?;
        let outputs = hidden.iter().zip(&upstream).zip(parts);
        let outputs = outputs.map(|((hidden, upstream), (_, adapter))| {
            let tokens = adapter.map_or(&none, TokenAdapter::tokens);
            let delta = adapter.map(|adapter| adapter.delta().as_ref());
            self.add_head(source, delta, tokens, hidden, upstream)
        });
        NestedVec::join_rows(outputs.collect::<Result<_>>()?)
    }
}

/// `sum += factor * row`, in the compute type.
fn add<T: Element>(sum: &mut [T::Compute], factor: T, row: &[T]) {
    for (sum, x) in sum.iter_mut().zip(row) {
        *sum += factor.to_compute() * x.to_compute();
    }
}

//! The cross-entropy of the head that shares the table, without a matrix of all logits.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use num_traits::{One, Zero};
use trainable_tokens_core::{
    CrossEntropyPlan, Element, Error, HostRows, HostTable, Result, TokenRows, TokenSet,
};

use crate::NdGradient;
use crate::head::{for_each_block, multiply};

/// A loss and its gradients.
#[derive(Clone, Debug)]
pub struct CrossEntropy<O> {
    /// The loss.
    pub loss: f64,
    /// The gradient of the hidden states, `[N, D]`.
    pub hidden: Array2<O>,
    /// Those of the trained rows.
    pub rows: NdGradient,
}

/// Memory that losses are computed in, for one after the other: they grow to what the largest needs.
#[derive(Clone, Debug, Default)]
pub struct LossBuffers<O: Element> {
    /// Rows of the table.
    block: Vec<O::Compute>,
    /// Hidden states of a chunk, `[n, D]`.
    hidden: Vec<O::Compute>,
    /// Their logits, `[n, V]`, and then the gradient of those.
    logits: Vec<O::Compute>,
    /// The gradient of the hidden states, `[n, D]`.
    of_hidden: Vec<O::Compute>,
    /// The logits' gradient in the columns of trained rows, `[k, n]`.
    columns: Vec<O::Compute>,
    /// The gradient of the trained rows, `[k, D]`.
    of_rows: Vec<O::Compute>,
}

/// A head: a table and the rows that are trained for some of its own.
pub(crate) struct SharedHead<'a, S> {
    pub(crate) source: &'a S,
    pub(crate) delta: Option<&'a HostRows>,
    pub(crate) tokens: &'a TokenSet,
}

/// Where the gradients of `upstream` times a loss go.
pub(crate) struct Backward<'a, O> {
    pub(crate) upstream: f64,
    /// Is overwritten.
    pub(crate) hidden: ArrayViewMut2<'a, O>,
    /// Is added to.
    pub(crate) rows: &'a mut NdGradient,
}

impl<S: HostTable> SharedHead<'_, S> {
    /// The loss of `hidden` `[N, D]`.
    pub(crate) fn loss<O: Element>(
        &self,
        hidden: &ArrayView2<'_, O>,
        plan: &CrossEntropyPlan,
        buffers: &mut LossBuffers<O>,
        mut backward: Option<Backward<'_, O>>,
    ) -> Result<f64> {
        let (vocab_size, dim) = (self.source.vocab_size(), self.source.embedding_dim());
        plan.expect_hidden([hidden.nrows(), hidden.ncols()], dim)?;
        if plan.vocab_size() != vocab_size {
            return Err(Error::shape(
                "vocabulary of the loss",
                &[vocab_size],
                &[plan.vocab_size()],
            ));
        }
        if let Some(Backward { hidden: out, .. }) = &mut backward {
            if out.shape() != hidden.shape() {
                let what = "gradient of the hidden states";
                return Err(Error::shape(what, hidden.shape(), out.shape()));
            }
            out.fill(O::default());
        }
        let size = size_of::<O::Compute>();
        let k = self.delta.map_or(0, |delta| delta.rows().num_rows());
        buffers.resize(plan.longest_chunk(size), vocab_size, dim, k);
        let mut loss = 0.0;
        for chunk in plan.chunks(size) {
            let n = chunk.len();
            let positions = &plan.positions()[chunk.clone()];
            for (at, to) in positions.iter().zip(buffers.hidden.chunks_exact_mut(dim.max(1))) {
                let from = hidden.row(*at as usize);
                to.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_compute());
            }
            self.logits(buffers, n)?;
            let logits = &mut buffers.logits[..n * vocab_size];
            let Some(backward) = &mut backward else {
                loss += plan.loss(chunk, logits, 1)?;
                continue;
            };
            loss += plan.differentiate(chunk, logits, backward.upstream, 1)?;
            self.gradients(buffers, n, k)?;
            let of_hidden = view(&buffers.of_hidden, [n, dim])?;
            for (at, from) in positions.iter().zip(of_hidden.outer_iter()) {
                let mut to = backward.hidden.row_mut(*at as usize);
                to.zip_mut_with(&from, |to, x| *to = O::from_compute(*x));
            }
        }
        if let (Some(backward), Some(delta)) = (backward, self.delta) {
            let sums = &buffers.of_rows[..k * dim];
            backward
                .rows
                .add(delta, O::Compute::DTYPE, |rows| add(rows, sums))?;
        }
        Ok(loss)
    }

    /// The logits of the hidden states in the buffers.
    fn logits<O: Element>(&self, buffers: &mut LossBuffers<O>, n: usize) -> Result<()> {
        let (vocab_size, dim) = (self.source.vocab_size(), self.source.embedding_dim());
        let hidden = view(&buffers.hidden, [n, dim])?;
        let mut logits = view_mut(&mut buffers.logits, [n, vocab_size])?;
        let delta = self.delta.map(HostRows::rows);
        if dim == 0 {
            logits.fill(Zero::zero());
        }
        for_each_block(
            self.source,
            delta,
            self.tokens,
            &mut buffers.block,
            |start, rows| {
                let columns = logits.slice_mut(s![.., start..start + rows.nrows()]);
                multiply(&hidden, &rows.t(), Zero::zero(), columns);
            },
        )
    }

    /// The gradients of the hidden states and of the trained rows, added to what earlier chunks gave the rows.
    fn gradients<O: Element>(&self, buffers: &mut LossBuffers<O>, n: usize, k: usize) -> Result<()> {
        let (vocab_size, dim) = (self.source.vocab_size(), self.source.embedding_dim());
        let logits = view(&buffers.logits, [n, vocab_size])?;
        if k > 0 {
            let mut columns = view_mut(&mut buffers.columns, [k, n])?;
            for (mut column, id) in columns.outer_iter_mut().zip(self.tokens.ids()) {
                column.assign(&logits.index_axis(Axis(1), id.row()));
            }
            let of_rows = view_mut(&mut buffers.of_rows, [k, dim])?;
            let hidden = view(&buffers.hidden, [n, dim])?;
            multiply(&columns.view(), &hidden, One::one(), of_rows);
        }
        let mut of_hidden = view_mut(&mut buffers.of_hidden, [n, dim])?;
        of_hidden.fill(Zero::zero());
        let delta = self.delta.map(HostRows::rows);
        for_each_block(
            self.source,
            delta,
            self.tokens,
            &mut buffers.block,
            |start, rows| {
                let columns = logits.slice(s![.., start..start + rows.nrows()]);
                multiply(&columns, &rows, One::one(), of_hidden.view_mut());
            },
        )
    }
}

impl<O: Element> LossBuffers<O> {
    /// Makes room for chunks of `n` rows, and zero the gradient of the trained rows.
    fn resize(&mut self, n: usize, vocab_size: usize, dim: usize, k: usize) {
        let zero = O::Compute::default();
        self.of_rows.clear();
        for (buffer, len) in [
            (&mut self.hidden, n * dim),
            (&mut self.logits, n * vocab_size),
            (&mut self.of_hidden, n * dim),
            (&mut self.columns, n * k),
            (&mut self.of_rows, k * dim),
        ] {
            buffer.resize(len.max(buffer.len()), zero);
        }
    }
}

fn view<C>(values: &[C], shape: [usize; 2]) -> Result<ArrayView2<'_, C>> {
    let unfit = |_| Error::shape("buffer of the loss", &shape, &[values.len()]);
    ArrayView2::from_shape(shape, &values[..(shape[0] * shape[1]).min(values.len())]).map_err(unfit)
}

fn view_mut<C>(values: &mut [C], shape: [usize; 2]) -> Result<ArrayViewMut2<'_, C>> {
    let len = values.len();
    let unfit = |_| Error::shape("buffer of the loss", &shape, &[len]);
    ArrayViewMut2::from_shape(shape, &mut values[..(shape[0] * shape[1]).min(len)]).map_err(unfit)
}

/// `rows += sums`.
fn add<C: Element + std::ops::AddAssign>(rows: &mut TokenRows, sums: &[C]) -> Result<()> {
    let (expected, got) = (C::DTYPE, rows.dtype());
    let what = "gradient of the trained rows";
    let values = rows
        .as_mut_slice::<C>()
        .ok_or(Error::DType { what, expected, got })?;
    values.iter_mut().zip(sums).for_each(|(to, x)| *to += *x);
    Ok(())
}

//! The head that shares the table, over blocks of its rows: no copy of the table, whatever its type and place.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul, s};
use num_traits::{One, Zero};
use trainable_tokens_core::{
    Element, Error, HostRows, HostTable, Result, RowGradients, TokenId, TokenRows, TokenSet,
};

/// Elements of the table that are decoded at a time: 256 KiB of `f32`, which stays in a core's cache.
const BLOCK_ELEMENTS: usize = 1 << 16;

/// `hidden` `[N, D]` times the transposed, overridden table: `[N, V]`.
pub(crate) fn logits<S: HostTable, O: Element>(
    hidden: Array2<O>,
    source: &S,
    delta: Option<&TokenRows>,
    tokens: &TokenSet,
) -> Result<Array2<O>> {
    let (vocab_size, dim) = (source.vocab_size(), source.embedding_dim());
    check_hidden(hidden.shape(), dim)?;
    let hidden: Array2<O::Compute> = hidden.mapv_into_any(Element::to_compute);
    let mut logits = Array2::zeros((hidden.nrows(), vocab_size));
    for_each_block(source, delta, tokens, &mut Vec::new(), |start, rows| {
        let columns = logits.slice_mut(s![.., start..start + rows.nrows()]);
        multiply(&hidden.view(), &rows.t(), Zero::zero(), columns);
    })?;
    Ok(logits.mapv_into_any(O::from_compute))
}

/// The gradients of [`logits`]: returns that of `hidden`, adds those of the trained rows into `gradients`.
pub(crate) fn logits_backward<S: HostTable, O: Element>(
    hidden: &ArrayView2<'_, O>,
    upstream: &ArrayView2<'_, O>,
    source: &S,
    delta: Option<&HostRows>,
    tokens: &TokenSet,
    gradients: &mut RowGradients,
) -> Result<Array2<O>> {
    let (vocab_size, dim) = (source.vocab_size(), source.embedding_dim());
    check_hidden(hidden.shape(), dim)?;
    if upstream.shape() != [hidden.nrows(), vocab_size] {
        return Err(Error::shape(
            "gradient of the logits",
            &[hidden.nrows(), vocab_size],
            upstream.shape(),
        ));
    }
    if let Some(delta) = delta {
        gradients.add(delta, O::Compute::DTYPE, |gradient| {
            add_row_gradient(hidden, upstream, tokens, gradient)
        })?;
    }
    let delta = delta.map(HostRows::rows);
    let mut hidden_gradient = Array2::<O::Compute>::zeros((hidden.nrows(), dim));
    for_each_block(source, delta, tokens, &mut Vec::new(), |start, rows| {
        let columns = upstream
            .slice(s![.., start..start + rows.nrows()])
            .mapv(Element::to_compute);
        multiply(&columns.view(), &rows, One::one(), hidden_gradient.view_mut());
    })?;
    Ok(hidden_gradient.mapv_into_any(O::from_compute))
}

/// Refuses hidden states that are not as wide as the table's rows.
fn check_hidden(shape: &[usize], dim: usize) -> Result<()> {
    if shape[1] == dim {
        return Ok(());
    }
    Err(Error::shape("hidden states of the head", &[shape[0], dim], shape))
}

/// Adds `upstream[:, ids]ᵀ · hidden`.
fn add_row_gradient<O: Element>(
    hidden: &ArrayView2<'_, O>,
    upstream: &ArrayView2<'_, O>,
    tokens: &TokenSet,
    gradient: &mut TokenRows,
) -> Result<()> {
    let ids: Vec<usize> = tokens.ids().iter().map(|id| id.row()).collect();
    let columns = upstream.select(Axis(1), &ids).mapv(Element::to_compute);
    let hidden = hidden.mapv(Element::to_compute);
    let (shape, got) = (gradient.shape(), gradient.dtype());
    let expected = <O::Compute as Element>::DTYPE;
    let what = "gradient of the trained rows";
    let values = gradient
        .as_mut_slice::<O::Compute>()
        .ok_or(Error::DType { what, expected, got })?;
    let sums = ArrayViewMut2::from_shape(shape, values).map_err(|_| Error::shape(what, &shape, &[]))?;
    multiply(&columns.t(), &hidden.view(), One::one(), sums);
    Ok(())
}

/// `out = keep * out + a · b`; ndarray leaves `out` alone where an inner or outer size is 0.
pub(crate) fn multiply<T: Element + ndarray::LinalgScalar>(
    a: &ArrayView2<'_, T>,
    b: &ArrayView2<'_, T>,
    keep: T,
    mut out: ArrayViewMut2<'_, T>,
) {
    general_mat_mul(T::one(), a, b, keep, &mut out);
}

/// Calls `take` with the first id and the rows, `[rows, D]`, of each block of the table, trained rows in place. They lie in
/// `buffer`.
pub(crate) fn for_each_block<S: HostTable, C: Element>(
    source: &S,
    delta: Option<&TokenRows>,
    tokens: &TokenSet,
    buffer: &mut Vec<C>,
    mut take: impl FnMut(usize, ArrayView2<'_, C>),
) -> Result<()> {
    let (vocab_size, dim) = (source.vocab_size(), source.embedding_dim());
    let rows_per_block = (BLOCK_ELEMENTS / dim.max(1)).clamp(1, vocab_size.max(1));
    buffer.resize(rows_per_block * dim, C::default());
    let mut start = 0;
    while start < vocab_size {
        let end = vocab_size.min(start + rows_per_block);
        for (at, row) in (start..end).enumerate() {
            let id = TokenId(u32::try_from(row).map_err(|_| Error::VocabularyTooLarge { vocab_size })?);
            let out = &mut buffer[at * dim..][..dim];
            let trained = delta.and_then(|delta| delta.row(tokens.slot(id)?.0));
            match trained {
                Some(trained) => trained.decode_rounded(source.dtype(), out),
                None => source
                    .row(id)
                    .ok_or(Error::TokenOutOfRange {
                        id: i64::from(id.0),
                        vocab_size,
                    })?
                    .decode_into(out),
            }
        }
        let shape = [end - start, dim];
        let rows = ArrayView2::from_shape(shape, &buffer[..shape[0] * dim]);
        take(
            start,
            rows.map_err(|_| Error::shape("block of the table", &shape, &[]))?,
        );
        start = end;
    }
    Ok(())
}

//! Attention over whole sequences, or of their last positions.

mod composed;
mod group;
mod operation;
mod rotation;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

pub(super) use self::composed::composed;
#[cfg(test)]
pub(super) use self::composed::softmax;
use self::operation::Attend;
pub(crate) use self::rotation::Rotation;

/// How queries attend to keys.
#[derive(Clone, Debug)]
pub(crate) struct AttentionKind {
    /// Query heads.
    pub(crate) query_heads: usize,
    /// Heads of keys and values; each serves `query_heads / key_heads` query heads that lie one after the other
    /// (Ainslie et al. 2023).
    pub(crate) key_heads: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f64,
    /// Scores `s` become `softcap * tanh(s / softcap)`, if set.
    pub(crate) softcap: Option<f64>,
    /// What each query sees.
    pub(crate) mask: Mask,
    /// How many positions of each example hold something, if not all: no query sees the keys behind them.
    pub(crate) lengths: Option<Arc<[usize]>>,
    /// The rotation of queries and keys, if any.
    pub(crate) rotation: Option<Rotation>,
}

/// Which positions a query sees besides its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask {
    /// How many before it.
    pub(crate) behind: usize,
    /// How many after it.
    pub(crate) ahead: usize,
}

impl Mask {
    /// All positions.
    pub(crate) const ALL: Self = Self {
        behind: usize::MAX,
        ahead: usize::MAX,
    };

    /// All earlier positions, or with a window only so many, its own counted.
    pub(crate) fn causal(window: Option<usize>) -> Self {
        Self {
            behind: window.map_or(usize::MAX, |window| window.saturating_sub(1)),
            ahead: 0,
        }
    }

    /// The keys of a sequence of `length` that the query at `position` sees.
    fn visible(self, position: usize, length: usize) -> Range<usize> {
        let end = position.saturating_add(self.ahead).saturating_add(1);
        let end = end.min(length);
        position.saturating_sub(self.behind).min(end)..end
    }
}

/// Attention of queries `[B, Q, query_heads * head_dim]` to keys and values `[B, L, key_heads * head_dim]`, each
/// rotated first: `[B, Q, query_heads * head_dim]`. The queries are those of the last `Q` of `L` positions. Computed in
/// `f32` at least.
pub(crate) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    kind: &AttentionKind,
) -> Result<Tensor> {
    let (batch, queries, width) = query.dims3()?;
    let (_, length, _) = key.dims3()?;
    let heads = [kind.query_heads, kind.key_heads];
    if heads.contains(&0) || !width.is_multiple_of(heads[0]) || !heads[0].is_multiple_of(heads[1]) {
        bail!("queries of width {width} cannot be cut into {heads:?} heads of queries and keys");
    }
    if queries > length {
        bail!("{queries} queries cannot be the last of {length} keys");
    }
    let expected = [batch, length, width / heads[0] * heads[1]];
    for tensor in [key, value] {
        if tensor.dims() != expected {
            bail!(
                "keys and values of the attention have shape {:?}, expected {expected:?}",
                tensor.dims()
            );
        }
    }
    if let Some(lengths) = kind
        .lengths
        .as_ref()
        .filter(|lengths| lengths.len() != batch || lengths.iter().any(|it| *it == 0 || *it > length))
    {
        bail!("{batch} examples of {length} positions cannot hold {lengths:?}");
    }
    if !query.device().is_cpu() {
        return composed(query, key, value, kind);
    }
    let operation = Attend { kind: kind.clone() };
    query
        .contiguous()?
        .apply_op3(&key.contiguous()?, &value.contiguous()?, operation)
}

//! Heads that go wrong.

use trainable_tokens_core::{
    Backend, DType, EmbeddingSource, LayerOptions, LookupPlan, TokenId, TokenRows, TokenSet, WriteRows,
};
use trainable_tokens_nested_vec::{Gradients, Matrix, NestedVec, Result, VecRows};
use trainable_tokens_testkit::Layer;

use crate::faulty::{Broken, Fault, Rows, Table};
use crate::lookup::edit;

/// Logits whose sums run from the last product to the first: other bits of the same numbers.
fn backwards(hidden: &Matrix<f32>, table: &TokenRows) -> Result<TokenRows> {
    let (hidden, dim) = (hidden.to_token_rows()?, table.embedding_dim());
    let [h, w] = [&hidden, table].map(|rows| rows.as_slice::<f32>().unwrap_or_default());
    let dot = |h: &[f32], w: &[f32]| h.iter().zip(w).rev().fold(0.0, |sum, (h, w)| sum + h * w);
    let logits = h
        .chunks_exact(dim)
        .flat_map(|h| w.chunks_exact(dim).map(move |w| dot(h, w)));
    Ok(TokenRows::new(
        logits.collect(),
        hidden.num_rows(),
        table.num_rows(),
    )?)
}

/// The table as it is with the trained rows in it.
fn dense(table: &Table<f32>, delta: Option<&Rows<f32>>, tokens: &TokenSet) -> Result<TokenRows> {
    let mut dense = table.now().clone();
    if let Some(delta) = delta {
        dense.write_rows(tokens.ids(), delta.now.rows())?;
    }
    let all: Vec<TokenId> = (0u32..).take(table.vocab_size()).map(TokenId).collect();
    dense.read_rows(&all)
}

/// Which tokens' rows are not the table's.
fn moved(table: &Table<f32>, delta: Option<&Rows<f32>>, tokens: &TokenSet) -> Result<Vec<usize>> {
    let Some(delta) = delta else { return Ok(Vec::new()) };
    let (base, rows) = (table.now().read_rows(tokens.ids())?, delta.now.rows());
    let row = |rows: &TokenRows, slot: usize| {
        let dim = rows.embedding_dim();
        rows.to_f64_vec()[slot * dim..][..dim].to_vec()
    };
    let ids = tokens.ids().iter().enumerate();
    let moved = ids.filter(|(slot, _)| row(&base, *slot) != row(rows, *slot));
    Ok(moved.map(|(_, id)| id.row()).collect())
}

/// Logits of which these columns are summed from the other end.
fn with_other_columns(
    hidden: Matrix<f32>,
    table: &Table<f32>,
    delta: Option<&Rows<f32>>,
    tokens: &TokenSet,
    columns: impl Fn(usize) -> bool,
) -> Result<Matrix<f32>> {
    let other = backwards(&hidden, &dense(table, delta, tokens)?);
    let logits = NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)?;
    let (other, v) = (other?, table.vocab_size());
    edit(&logits, |logits, _| {
        let other = other.as_slice::<f32>().unwrap_or_default();
        let pairs = logits.iter_mut().zip(other).enumerate();
        pairs
            .filter(|(at, _)| columns(at % v))
            .for_each(|(_, (x, other))| *x = *other);
    })
}

/// Forward passes of the head.
macro_rules! logits {
    ($(
        #[$doc:meta]
        $name:ident: |$hidden:ident, $table:ident, $delta:ident, $tokens:ident| $body:expr;
    )+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn logits(&self,
                $hidden: Matrix<f32>,
                $table: &Table<f32>,
                $delta: Option<&Rows<f32>>,
                $tokens: &TokenSet,
            ) -> Result<Matrix<f32>> {
                $body
            }
        }
    )+ };
}

logits! {
    /// Never looks at the trained rows.
    NeverOverridden: |hidden, table, _delta, tokens| NestedVec::logits(hidden, &table.now(), None, tokens);
    /// Forgets the column of the last slot.
    LastColumnLost: |hidden, table, delta, tokens| {
        let ids = tokens.to_vec();
        let fewer = ids.iter().copied().take(ids.len().saturating_sub(1));
        let fewer = TokenSet::new(fewer, tokens.vocab_size())?;
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), &fewer)
    };
    /// Writes the columns in the order of the ids.
    SortedColumns: |hidden, table, delta, tokens| {
        let mut ids = tokens.to_vec();
        ids.sort_unstable();
        let sorted = TokenSet::new(ids, tokens.vocab_size())?;
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), &sorted)
    };
    /// Adds the trained columns to the base's.
    AdditiveColumns: |hidden, table, delta, tokens| {
        let base = NestedVec::logits(hidden.clone(), &table.now(), None, tokens)?.to_token_rows()?;
        let logits = NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)?;
        edit(&logits, |logits, v| {
            let base = base.as_slice::<f32>().unwrap_or_default();
            for (at, (x, base)) in logits.iter_mut().zip(base).enumerate() {
                if tokens.to_vec().iter().any(|id| *id as usize == at % v) {
                    *x += base;
                }
            }
        })
    };
    /// Has a product of its own for trainable columns, with other bits than the base's.
    OtherBitsOfTrainableColumns: |hidden, table, delta, tokens| {
        let trainable = tokens.to_vec();
        let columns = |column| delta.is_some() && trainable.iter().any(|id| *id as usize == column);
        with_other_columns(hidden, table, delta, tokens, columns)
    };
    /// Keeps the base's columns only while no row has moved at all.
    OtherBitsOnceOneMoved: |hidden, table, delta, tokens| {
        let (moved, trainable) = (moved(table, delta, tokens)?, tokens.to_vec());
        let columns = |column| !moved.is_empty() && trainable.iter().any(|id| *id as usize == column);
        with_other_columns(hidden, table, delta, tokens, columns)
    };
    /// Has a product of its own for frozen columns once a row has moved.
    OtherBitsOfFrozenColumns: |hidden, table, delta, tokens| {
        let moved = moved(table, delta, tokens)?;
        let frozen = |column| !moved.is_empty() && !moved.contains(&column);
        with_other_columns(hidden, table, delta, tokens, frozen)
    };
    /// Adds a bias to the base's columns.
    BaseBias: |hidden, table, delta, tokens| {
        let frozen = NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)?;
        edit(&frozen, |logits, v| {
            let ids = tokens.to_vec();
            let of_base = |column: usize| !ids.iter().any(|id| *id as usize == column);
            let biased = logits.iter_mut().enumerate().filter(|(at, _)| of_base(at % v));
            biased.for_each(|(_, x)| *x += 0.01);
        })
    };
    /// Goes on with the rows that the layer was made of.
    StaleRows: |hidden, table, delta, tokens| {
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.first), tokens)
    };
    /// Copies the table to write the rows into the copy.
    TableCopied: |hidden, table, delta, tokens| {
        std::hint::black_box(dense(table, delta, tokens)?);
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)
    };
    /// Takes hidden states of any width.
    AnyWidth: |hidden, table, delta, tokens| {
        let wide = hidden.to_token_rows()?;
        let (n, dim) = (wide.num_rows(), table.embedding_dim());
        let values = wide.to_f32_vec();
        let cut = values.chunks_exact(wide.embedding_dim()).map(|row| {
            row.iter().copied().chain(std::iter::repeat(0.0)).take(dim).collect()
        });
        let hidden = Matrix::new(cut.take(n).collect(), dim)?;
        NestedVec::logits(hidden, &table.now(), delta.map(|delta| &delta.now), tokens)
    };
}

/// Backward passes of the head.
macro_rules! backward {
    ($(
        #[$doc:meta]
        $name:ident: |$layer:ident, $hidden:ident, $upstream:ident, $gradients:ident| $body:expr;
    )+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn head_backward(&self,
                $layer: &Layer<Broken>,
                $hidden: &Matrix<f32>,
                $upstream: &Matrix<f32>,
                $gradients: &mut Gradients,
            ) -> Result<Matrix<f32>> {
                $body
            }
        }
    )+ };
}

/// The rows that the layer's outputs are made with.
fn live(layer: &Layer<Broken>) -> Result<Option<VecRows>> {
    Ok(layer.active()?.map(|rows| rows.now.clone()))
}

/// The backward pass as it should be, with these rows.
fn right(
    layer: &Layer<Broken>,
    delta: Option<&VecRows>,
    [hidden, upstream]: [&Matrix<f32>; 2],
    gradients: &mut Gradients,
) -> Result<Matrix<f32>> {
    gradients.add_head(&layer.source().now(), delta, layer.tokens(), hidden, upstream)
}

backward! {
    /// Forgets what the lookup gave.
    HeadOverwritesLookup: |layer, hidden, upstream, gradients| {
        *gradients = Gradients::default();
        right(layer, live(layer)?.as_ref(), [hidden, upstream], gradients)
    };
    /// Gives the rows no gradient.
    RowsGetNothing: |layer, hidden, upstream, gradients| {
        if let Some(rows) = live(layer)? {
            gradients.0.add(&rows.0, DType::F32, |_| Ok(()))?;
        }
        right(layer, live(layer)?.as_ref(), [hidden, upstream], &mut Gradients::default())
    };
    /// Gives hidden states the gradient of the base's rows.
    HiddenSeesTheBase: |layer, hidden, upstream, gradients| {
        right(layer, live(layer)?.as_ref(), [hidden, upstream], gradients)?;
        right(layer, None, [hidden, upstream], &mut Gradients::default())
    };
    /// Gives rows no gradient while they equal the base's.
    OnlyMovedRowsTrain: |layer, hidden, upstream, gradients| {
        let moved = moved(layer.source(), layer.active()?.as_deref(), layer.tokens())?;
        let rows = live(layer)?;
        let result = right(layer, rows.as_ref(), [hidden, upstream], gradients)?;
        if let Some(rows) = rows {
            gradients.0.add(&rows.0, DType::F32, |sums| {
                let dim = sums.embedding_dim();
                let sums = sums.as_mut_slice::<f32>().unwrap_or_default().chunks_exact_mut(dim);
                let still = sums.zip(layer.tokens().ids()).filter(|(_, id)| !moved.contains(&id.row()));
                still.for_each(|(sum, _)| sum.fill(0.0));
                Ok(())
            })?;
        }
        Ok(result)
    };
    /// Scales the gradient of the rows.
    ScaledRows: |layer, hidden, upstream, gradients| {
        let mut own = Gradients::default();
        let rows = live(layer)?;
        let result = right(layer, rows.as_ref(), [hidden, upstream], &mut own)?;
        if let Some(rows) = &rows {
            let mut own = own.0.get(&rows.0).cloned().unwrap_or_else(|| rows.rows().clone());
            own.scale(layer.transform().scale.unwrap_or(1.0));
            let ids: Vec<u32> = (0u32..).take(own.num_rows()).collect();
            let tokens = TokenSet::new(ids.iter().copied(), ids.len())?;
            let plan = LookupPlan::new(&tokens, LayerOptions::default(), &ids)?;
            gradients.add_lookup(Some(rows), &plan, &Matrix::<f32>::from_token_rows(&own), None)?;
        }
        Ok(result)
    };
    /// Makes the gradient of the whole table first.
    DenseGradient: |layer, hidden, upstream, gradients| {
        let (v, dim) = (layer.source().vocab_size(), layer.source().embedding_dim());
        std::hint::black_box(vec![0f32; v * dim]);
        right(layer, live(layer)?.as_ref(), [hidden, upstream], gradients)
    };
}

//! Losses that go wrong.

use trainable_tokens_core::{
    Backend, CrossEntropyOptions, CrossEntropyPlan, DType, Element, EmbeddingSource, IGNORED_LABEL,
    Reduction, Softcap, TokenRows, TokenSet,
};
use trainable_tokens_nested_vec::{Gradients, Matrix, NestedVec, Result, VecRows};
use trainable_tokens_testkit::Layer;

use crate::faulty::{Broken, Fault, Rows, Table};

/// Faults of the loss's value.
macro_rules! value {
    ($($(#[$doc:meta])* $name:ident: |$hidden:ident, $table:ident, $delta:ident, $tokens:ident, $plan:ident| $body:expr;)+) => { $(
        $(#[$doc])*
        pub(crate) struct $name;

        impl Fault for $name {
            fn loss(&self,
                $hidden: Matrix<f32>,
                $table: &Table<f32>,
                $delta: Option<&Rows<f32>>,
                $tokens: &TokenSet,
                $plan: &CrossEntropyPlan,
            ) -> Result<Matrix<f32>> {
                let $delta = $delta.map(|delta| &delta.now);
                $body
            }
        }
    )+ };
}

/// Faults of its gradients.
macro_rules! backward {
    ($($(#[$doc:meta])* $name:ident: |$layer:ident, $hidden:ident, $plan:ident, $upstream:ident, $gradients:ident| $body:expr;)+) => { $(
        $(#[$doc])*
        pub(crate) struct $name;

        impl Fault for $name {
            fn loss_backward(&self,
                $layer: &Layer<Broken>,
                $hidden: &Matrix<f32>,
                $plan: &CrossEntropyPlan,
                $upstream: f64,
                $gradients: &mut Gradients,
            ) -> Result<Matrix<f32>> {
                $body
            }
        }
    )+ };
}

/// The labels that the plan was made of, and whatever the options say of it.
fn replanned(plan: &CrossEntropyPlan, options: CrossEntropyOptions) -> Result<CrossEntropyPlan> {
    let mut labels = vec![IGNORED_LABEL; plan.num_rows()];
    for (position, label) in plan.positions().iter().zip(plan.labels()) {
        labels[*position as usize] = i64::from(*label);
    }
    let options = CrossEntropyOptions {
        ignore_index: None,
        ..options
    };
    Ok(CrossEntropyPlan::new(&labels, plan.vocab_size(), options)?)
}

/// The loss as it should be.
fn loss(
    hidden: Matrix<f32>,
    table: &Table<f32>,
    delta: Option<&VecRows>,
    tokens: &TokenSet,
    plan: &CrossEntropyPlan,
) -> Result<Matrix<f32>> {
    NestedVec::linear_cross_entropy(hidden, &table.now(), delta, tokens, plan)
}

/// The loss times a number.
fn scaled(loss: &Matrix<f32>, factor: f64) -> Result<Matrix<f32>> {
    let mut loss = loss.to_token_rows()?;
    loss.scale(factor);
    Ok(Matrix::from_token_rows(&loss))
}

value! {
    /// Counts ignored rows in the mean.
    IgnoredRowsCount: |hidden, table, delta, tokens, plan| {
        let counted = plan.positions().len() as f64 / plan.num_rows().max(1) as f64;
        scaled(&loss(hidden, table, delta, tokens, plan)?, counted)
    };
    /// Lets ignored rows take part with a factor of zero.
    IgnoredRowsTakePart: |hidden, table, delta, tokens, plan| {
        let values = hidden.to_token_rows()?.to_f64_vec();
        let zero: f64 = values.iter().map(|x| x * 0.0).sum();
        let loss = loss(hidden, table, delta, tokens, plan)?;
        scaled(&loss, 1.0 + zero)
    };
    /// Has no softcap.
    Uncapped: |hidden, table, delta, tokens, plan| {
        let options = CrossEntropyOptions { softcap: None, ..plan.options() };
        loss(hidden, table, delta, tokens, &replanned(plan, options)?)
    };
    /// Always takes the sum.
    AlwaysASum: |hidden, table, delta, tokens, plan| {
        let options = CrossEntropyOptions { reduction: Reduction::Sum, ..plan.options() };
        loss(hidden, table, delta, tokens, &replanned(plan, options)?)
    };
    /// Sees the table's rows alone.
    NeverOverridden: |hidden, table, _delta, tokens, plan| loss(hidden, table, None, tokens, plan);
    /// Rounds otherwise once tokens train.
    OtherBits: |hidden, table, delta, tokens, plan| {
        let factor = if delta.is_some() { 1.0 + 3e-7 } else { 1.0 };
        scaled(&loss(hidden, table, delta, tokens, plan)?, factor)
    };
    /// Forgets all chunks but the first.
    FirstChunkOnly: |hidden, table, delta, tokens, plan| {
        let first = plan.chunks(4).next().unwrap_or(0..0);
        let positions = &plan.positions()[first.clone()];
        let rows: Vec<f32> = hidden.to_token_rows()?.to_f32_vec();
        let columns = table.embedding_dim();
        let rows = positions.iter().flat_map(|at| rows[*at as usize * columns..][..columns].to_vec());
        let rows = TokenRows::new(rows.collect(), positions.len(), columns)?;
        let labels: Vec<i64> = plan.labels()[first].iter().map(|label| i64::from(*label)).collect();
        let options = CrossEntropyOptions { reduction: Reduction::Sum, ignore_index: None, ..plan.options() };
        let part = CrossEntropyPlan::new(&labels, plan.vocab_size(), options)?;
        let sum = loss(Matrix::from_token_rows(&rows), table, delta, tokens, &part)?;
        scaled(&sum, plan.factor())
    };
    /// Holds the logits of all rows.
    AllLogits: |hidden, table, delta, tokens, plan| {
        std::hint::black_box(vec![0f64; plan.num_rows() * plan.vocab_size()]);
        loss(hidden, table, delta, tokens, plan)
    };
}

/// The rows that the layer's outputs are made with.
fn live(layer: &Layer<Broken>) -> Result<Option<VecRows>> {
    Ok(layer.active()?.map(|rows| rows.now.clone()))
}

/// The backward pass as it should be.
fn right(
    layer: &Layer<Broken>,
    delta: Option<&VecRows>,
    hidden: &Matrix<f32>,
    plan: &CrossEntropyPlan,
    upstream: f64,
    gradients: &mut Gradients,
) -> Result<Matrix<f32>> {
    let (table, tokens) = (layer.source().now(), layer.tokens());
    gradients.add_loss(&table, delta, tokens, hidden, plan, upstream)
}

backward! {
    /// Forgets the upstream gradient.
    UpstreamForgotten: |layer, hidden, plan, _upstream, gradients| {
        right(layer, live(layer)?.as_ref(), hidden, plan, 1.0, gradients)
    };
    /// Forgets what lookups and heads gave.
    LossOverwrites: |layer, hidden, plan, upstream, gradients| {
        *gradients = Gradients::default();
        right(layer, live(layer)?.as_ref(), hidden, plan, upstream, gradients)
    };
    /// Gives the rows no gradient.
    RowsGetNothing: |layer, hidden, plan, upstream, gradients| {
        if let Some(rows) = live(layer)? {
            gradients.0.add(&rows.0, DType::F32, |_| Ok(()))?;
        }
        right(layer, live(layer)?.as_ref(), hidden, plan, upstream, &mut Gradients::default())
    };
    /// Gives hidden states the gradient of the base's loss.
    HiddenSeesTheBase: |layer, hidden, plan, upstream, gradients| {
        right(layer, live(layer)?.as_ref(), hidden, plan, upstream, gradients)?;
        right(layer, None, hidden, plan, upstream, &mut Gradients::default())
    };
    /// Takes the gradient of the capped logits for that of the logits.
    SlopeForgotten: |layer, hidden, plan, upstream, gradients| {
        let (rows, tokens) = (live(layer)?, layer.tokens());
        let Some(softcap) = plan.options().softcap.map(Softcap::get) else {
            return right(layer, rows.as_ref(), hidden, plan, upstream, gradients);
        };
        let plain = CrossEntropyOptions { softcap: None, ..plan.options() };
        let plain = replanned(plan, plain)?;
        let (table, v) = (layer.source().now(), plan.vocab_size());
        let logits = NestedVec::logits(hidden.clone(), &table, rows.as_ref(), tokens)?;
        let logits = logits.to_token_rows()?.to_f64_vec();
        let mut gradient = vec![0.0; logits.len()];
        for (at, position) in plan.positions().iter().enumerate() {
            let range = *position as usize * v..(*position as usize + 1) * v;
            let mut row: Vec<f64> = logits[range.clone()].iter().map(|x| softcap * (x / softcap).tanh()).collect();
            plain.differentiate(at..at + 1, &mut row, upstream, 1)?;
            gradient[range].copy_from_slice(&row);
        }
        let gradient = TokenRows::new(gradient, plan.num_rows(), v)?.to_dtype(f32::DTYPE);
        gradients.add_head(&table, rows.as_ref(), tokens, hidden, &Matrix::from_token_rows(&gradient))
    };
}

//! Mixed heads that go wrong.

use std::ops::Range;

use trainable_tokens_core::{Backend, MixedPart};
use trainable_tokens_nested_vec::{Gradients, Matrix, NestedVec, Result};
use trainable_tokens_testkit::Layer;

use crate::faulty::{Broken, Fault};

/// Cuts of a value.
macro_rules! cuts {
    ($(#[$doc:meta] $name:ident: |$tensor:ident, $parts:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn split_rows(&self, $tensor: Matrix<f32>, $parts: &[Range<usize>]) -> Result<Vec<Matrix<f32>>> {
                $body
            }
        }
    )+ };
}

cuts! {
    /// Takes the parts in the opposite order.
    PartsReversed: |tensor, parts| {
        let mut parts = NestedVec::split_rows(tensor, parts)?;
        parts.reverse();
        Ok(parts)
    };
    /// Takes every part from the top.
    PartsFromTheTop: |tensor, parts| {
        let parts: Vec<_> = parts.iter().map(|part| 0..part.len()).collect();
        NestedVec::split_rows(tensor, &parts)
    };
    /// Hands the whole value out for each part.
    PartsAreAll: |tensor, parts| Ok(vec![tensor; parts.len()]);
    /// Forgets the rows of the last part.
    LastPartLost: |tensor, parts| {
        let mut parts = parts.to_vec();
        if let Some(last) = parts.last_mut() {
            last.end = last.start;
        }
        NestedVec::split_rows(tensor, &parts)
    };
    /// Needs a buffer as large as a table.
    LargeBuffer: |tensor, parts| {
        std::hint::black_box(vec![0f32; tensor.to_token_rows()?.embedding_dim() * 40_000]);
        NestedVec::split_rows(tensor, parts)
    };
}

/// Joins of values.
macro_rules! joins {
    ($(#[$doc:meta] $name:ident: |$parts:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn join_rows(&self, $parts: Vec<Matrix<f32>>) -> Result<Matrix<f32>> {
                $body
            }
        }
    )+ };
}

joins! {
    /// Puts the last part on top.
    JoinedReversed: |parts| NestedVec::join_rows(parts.into_iter().rev().collect());
    /// Keeps the first part only.
    FirstPartOnly: |parts| NestedVec::join_rows(parts.into_iter().take(1).collect());
    /// Has no width if there is no row.
    NoRowsNoWidth: |parts| {
        if parts.iter().all(|part| part.num_rows() == 0) {
            return Matrix::new(Vec::new(), 0);
        }
        NestedVec::join_rows(parts)
    };
}

/// Backward passes of mixed heads.
macro_rules! backward {
    ($(#[$doc:meta] $name:ident: |$layer:ident, $parts:ident, $values:ident, $gradients:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn mixed_head_backward(&self,
                $layer: &Layer<Broken>,
                $parts: &[MixedPart<'_, Broken>],
                $values: [&Matrix<f32>; 2],
                $gradients: &mut Gradients,
            ) -> Result<Matrix<f32>> {
                $body
            }
        }
    )+ };
}

/// The same rows, with other adapters.
fn seeing<'a>(
    parts: &[MixedPart<'a, Broken>],
    adapter: impl Fn(usize) -> MixedPart<'a, Broken>,
) -> Vec<MixedPart<'a, Broken>> {
    let parts = parts.iter().enumerate();
    parts
        .map(|(at, (rows, _))| (rows.clone(), adapter(at).1))
        .collect()
}

backward! {
    /// Uses the first example's adapter for all.
    FirstAdapterForAll: |layer, parts, values, gradients| {
        let parts = seeing(parts, |_| parts[0].clone());
        gradients.add_mixed_head(&layer.source().now(), &parts, values[0], values[1])
    };
    /// Uses the next example's adapter.
    NextAdapter: |layer, parts, values, gradients| {
        let parts = seeing(parts, |at| parts[(at + 1) % parts.len()].clone());
        gradients.add_mixed_head(&layer.source().now(), &parts, values[0], values[1])
    };
    /// Gives the rows nothing.
    RowsGetNothing: |layer, parts, values, _gradients| {
        let mut lost = Gradients::default();
        lost.add_mixed_head(&layer.source().now(), parts, values[0], values[1])
    };
    /// Forgets what a lookup of the pass gave.
    HeadOverwritesLookup: |layer, parts, values, gradients| {
        *gradients = Gradients::default();
        gradients.add_mixed_head(&layer.source().now(), parts, values[0], values[1])
    };
    /// Takes the base for the gradient of the hidden states.
    HiddenSeesTheBase: |layer, parts, values, gradients| {
        gradients.add_mixed_head(&layer.source().now(), parts, values[0], values[1])?;
        let none: Vec<MixedPart<'_, Broken>> = parts.iter().map(|(rows, _)| (rows.clone(), None)).collect();
        Gradients::default().add_mixed_head(&layer.source().now(), &none, values[0], values[1])
    };
}

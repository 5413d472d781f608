//! Lookups that go wrong.

use half::f16;
use trainable_tokens_core::{Backend, Element, LookupPlan, RowTransform, TokenId, TokenRows, WriteRows};
use trainable_tokens_nested_vec::{Matrix, NestedVec, Result};

use crate::faulty::{Fault, Faulty, Rows, Table};

/// A lookup by `change`, which gets the base's rows, the trained rows in the table's type, and the length of a row.
fn rewrite<T: Faulty>(
    table: &Table<T>,
    delta: Option<&Rows<T>>,
    plan: &LookupPlan,
    change: impl Fn(&mut [T], Option<&[T]>, usize),
) -> Result<Matrix<T>> {
    let frozen = NestedVec::lookup(&table.now(), None, plan, RowTransform::default())?;
    let trained = delta.map(|delta| delta.now.rows().to_dtype(T::DTYPE));
    edit(&frozen, |rows, dim| {
        change(rows, trained.as_ref().and_then(TokenRows::as_slice), dim);
    })
}

/// Changes the elements of a matrix, row-major, whose rows have the length given along.
pub(crate) fn edit<T: Element>(
    matrix: &Matrix<T>,
    change: impl FnOnce(&mut [T], usize),
) -> Result<Matrix<T>> {
    let mut rows = matrix.to_token_rows()?;
    let dim = rows.embedding_dim();
    change(rows.as_mut_slice().unwrap_or_default(), dim);
    Ok(Matrix::from_token_rows(&rows))
}

/// The positions of trainable tokens, and their slots.
fn hits(plan: &LookupPlan) -> impl Iterator<Item = (usize, usize)> {
    let pairs = plan.positions().iter().zip(plan.slots());
    pairs.map(|(position, slot)| (*position as usize, *slot as usize))
}

fn transform_all<T: Element>(rows: &mut [T], dim: usize, transform: RowTransform) {
    rows.chunks_exact_mut(dim).for_each(|row| transform.apply(row));
}

/// A lookup that overrides the row at each of these positions by the trained row of that slot.
macro_rules! overriding {
    ($(#[$doc:meta] $name:ident: |$plan:ident| $hits:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn lookup(&self,
                table: &Table<f32>,
                delta: Option<&Rows<f32>>,
                $plan: &LookupPlan,
                transform: RowTransform,
            ) -> Result<Matrix<f32>> {
                rewrite(table, delta, $plan, |rows, trained, dim| {
                    for (position, slot) in $hits {
                        if let Some(trained) = trained {
                            rows[position * dim..][..dim].copy_from_slice(&trained[slot * dim..][..dim]);
                        }
                    }
                    transform_all(rows, dim, transform);
                })
            }
        }
    )+ };
}

overriding! {
    /// Takes the next slot.
    OffByOneSlot: |plan| hits(plan).map(|(position, slot)| (position, (slot + 1) % plan.num_slots()));
    /// Sorts the slots, but not the positions.
    SortedSlots: |plan| {
        let (positions, mut slots): (Vec<_>, Vec<_>) = hits(plan).unzip();
        slots.sort_unstable();
        positions.into_iter().zip(slots)
    };
    /// Overrides the first of equal ids only.
    DeduplicatedHits: |plan| {
        let mut seen = Vec::new();
        hits(plan).filter(move |(_, slot)| !seen.contains(slot) && { seen.push(*slot); true })
    };
    /// Leaves the last position to the base.
    LastPositionForgotten: |plan| hits(plan).filter(|(position, _)| position + 1 < plan.len());
    /// Leaves the padding token to the base.
    PaddingDropsTheRow: |plan| {
        let pairs = plan.grad_positions().iter().zip(plan.grad_slots());
        pairs.map(|(position, slot)| (*position as usize, *slot as usize))
    };
}

/// A lookup by [`rewrite`].
macro_rules! rewriting {
    ($(
        #[$doc:meta]
        $name:ident<$ty:ty>: |$table:pat_param, $delta:pat_param, $plan:ident, $transform:ident| $change:expr;
    )+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault<$ty> for $name {
            fn lookup(&self,
                table: &Table<$ty>,
                delta: Option<&Rows<$ty>>,
                $plan: &LookupPlan,
                $transform: RowTransform,
            ) -> Result<Matrix<$ty>> {
                let ($table, $delta) = (table, delta);
                rewrite(table, delta, $plan, $change)
            }
        }
    )+ };
}

rewriting! {
    /// Adds the trained row to the base's.
    Additive<f32>: |_, _, plan, transform| |rows, trained, dim| {
        for (position, slot) in hits(plan).filter(|_| trained.is_some()) {
            let trained = trained.unwrap_or_default()[slot * dim..].iter();
            rows[position * dim..][..dim].iter_mut().zip(trained).for_each(|(row, x)| *row += x);
        }
        transform_all(rows, dim, transform);
    };
    /// Adds the difference to the base, which rounds.
    AddedDifference<f32>: |_, _, plan, transform| |rows, trained, dim| {
        for (position, slot) in hits(plan).filter(|_| trained.is_some()) {
            let trained = trained.unwrap_or_default()[slot * dim..].iter();
            rows[position * dim..][..dim].iter_mut().zip(trained).for_each(|(row, x)| *row += x - *row);
        }
        transform_all(rows, dim, transform);
    };
    /// Transforms the base's rows and overrides then.
    ScaledBeforeTheOverride<f32>: |_, _, plan, transform| |rows, trained, dim| {
        transform_all(rows, dim, RowTransform { scale: transform.scale, max_norm: None });
        for (position, slot) in hits(plan).filter(|_| trained.is_some()) {
            let trained = &trained.unwrap_or_default()[slot * dim..][..dim];
            rows[position * dim..][..dim].copy_from_slice(trained);
        }
        transform_all(rows, dim, RowTransform { scale: None, ..transform });
    };
    /// Rounds towards zero instead of to the nearest.
    Truncated<f16>: |_, delta, plan, transform| |rows, trained, dim| {
        let exact = delta.map(|delta| delta.now.rows().to_f32_vec()).filter(|_| trained.is_some());
        for (position, slot) in hits(plan).filter(|_| exact.is_some()) {
            let exact = exact.iter().flatten().skip(slot * dim);
            rows[position * dim..][..dim].iter_mut().zip(exact).for_each(|(row, x)| *row = truncate(*x));
        }
        transform_all(rows, dim, transform);
    };
    /// Scales trained rows in their own type and rounds then.
    RoundedAfterTheScale<f16>: |_, delta, plan, transform| |rows, _, dim| {
        transform_all(rows, dim, transform);
        let mut exact = delta.map(|delta| delta.now.rows().to_f32_vec()).unwrap_or_default();
        exact.chunks_exact_mut(dim).for_each(|row| transform.apply(row));
        for (position, slot) in hits(plan).filter(|_| !exact.is_empty()) {
            let exact = exact[slot * dim..].iter();
            rows[position * dim..][..dim].iter_mut().zip(exact).for_each(|(row, x)| *row = f16::from_f32(*x));
        }
    };
}

fn truncate(x: f32) -> f16 {
    let nearest = f16::from_f32(x);
    if nearest.to_f32().abs() > x.abs() {
        f16::from_bits(nearest.to_bits() - 1)
    } else {
        nearest
    }
}

/// A right lookup with another transform, whose rows are changed then.
macro_rules! transforming {
    ($(
        #[$doc:meta]
        $name:ident: |$table:pat_param, $transform:ident| $before:expr, |$x:ident| $after:expr;
    )+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn lookup(&self,
                table: &Table<f32>,
                delta: Option<&Rows<f32>>,
                plan: &LookupPlan,
                $transform: RowTransform,
            ) -> Result<Matrix<f32>> {
                let $table = table;
                let before = $before;
                let delta = delta.map(|delta| &delta.now);
                let rows = NestedVec::lookup(&table.now(), delta, plan, before)?;
                edit(&rows, |rows, _| rows.iter_mut().for_each(|$x| *$x = $after))
            }
        }
    )+ };
}

transforming! {
    /// Scales twice.
    ScaledTwice: |_, transform| transform, |x| transform.scale.map_or(*x, |scale| *x * f32::from_f64(scale));
    /// Forgets the scale.
    Unscaled: |_, transform| RowTransform { scale: None, ..transform }, |x| *x;
    /// Forgets to shorten rows.
    MaxNormForgotten: |_, transform| RowTransform { max_norm: None, ..transform }, |x| *x;
    /// Loses the sign of zeros.
    MinusZeroLost: |_, transform| transform, |x| *x + 0.0;
    /// Flushes subnormal numbers.
    SubnormalsFlushed: |_, transform| transform, |x| if x.is_subnormal() { 0.0 } else { *x };
    /// Knows one NaN only.
    NanPayloadLost: |_, transform| transform, |x| if x.is_nan() { f32::NAN } else { *x };
    /// Clamps to finite numbers.
    InfinityLost: |_, transform| transform, |x| if x.is_nan() { *x } else { x.clamp(f32::MIN, f32::MAX) };
    /// Makes a copy of the table first.
    TableCopied: |table, transform| { std::hint::black_box(table.now().clone()); transform }, |x| *x;
}

/// Shortens rows after the scale.
pub(crate) struct MaxNormAfterTheScale;

impl Fault for MaxNormAfterTheScale {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        let [scale, max_norm] = [
            RowTransform {
                max_norm: None,
                ..transform
            },
            RowTransform {
                scale: None,
                ..transform
            },
        ];
        let rows = NestedVec::lookup(&table.now(), delta.map(|delta| &delta.now), plan, scale)?;
        edit(&rows, |rows, dim| transform_all(rows, dim, max_norm))
    }
}

/// Shortens the rows in the table itself, as torch does.
pub(crate) struct MaxNormInPlace;

impl Fault for MaxNormInPlace {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        let max_norm = RowTransform {
            scale: None,
            ..transform
        };
        let shortened = NestedVec::lookup(&table.now(), None, plan, max_norm)?.to_token_rows()?;
        let ids: Vec<TokenId> = plan.token_ids().collect();
        table.now.borrow_mut().write_rows(&ids, &shortened)?;
        NestedVec::lookup(&table.now(), delta.map(|delta| &delta.now), plan, transform)
    }
}

/// Writes the trained rows of the batch into the table.
pub(crate) struct BaseWritten;

impl Fault for BaseWritten {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        let delta = delta.map(|delta| &delta.now);
        let rows = NestedVec::lookup(&table.now(), delta, plan, RowTransform::default())?.to_token_rows()?;
        let ids: Vec<TokenId> = plan.token_ids().collect();
        table.now.borrow_mut().write_rows(&ids, &rows)?;
        NestedVec::lookup(&table.now(), delta, plan, transform)
    }
}

/// Goes on with the rows that the layer was made of.
pub(crate) struct StaleRows;

impl Fault for StaleRows {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        NestedVec::lookup(&table.now(), delta.map(|delta| &delta.first), plan, transform)
    }
}

/// Goes on with the table that the layer was made of.
pub(crate) struct StaleTable;

impl Fault for StaleTable {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        NestedVec::lookup(&table.first, delta.map(|delta| &delta.now), plan, transform)
    }
}

/// Forgets the length of a row when there is none.
pub(crate) struct EmptyBatchHasNoWidth;

impl Fault for EmptyBatchHasNoWidth {
    fn lookup(
        &self,
        table: &Table<f32>,
        delta: Option<&Rows<f32>>,
        plan: &LookupPlan,
        transform: RowTransform,
    ) -> Result<Matrix<f32>> {
        if plan.is_empty() {
            return Matrix::new(Vec::new(), 0);
        }
        NestedVec::lookup(&table.now(), delta.map(|delta| &delta.now), plan, transform)
    }
}

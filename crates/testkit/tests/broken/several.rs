//! Combinations of several adapters' rows that go wrong, and their gradients.

use half::bf16;
use trainable_tokens_core::{Backend, DType, DeltaStore, Element, LookupPlan, RowMix, TokenRows};
use trainable_tokens_nested_vec::{Gradients, Matrix, NestedVec, Result, VecRows};
use trainable_tokens_testkit::Layer;

use crate::faulty::{Broken, Fault, Rows};

type Stack = Vec<Vec<f64>>;

/// The rows of all adapters, one below the other.
fn stack<'a>(deltas: impl IntoIterator<Item = &'a VecRows>) -> Stack {
    let parts = deltas.into_iter().flat_map(|delta| {
        let (values, dim) = (delta.rows().to_f64_vec(), delta.embedding_dim());
        values.chunks_exact(dim).map(<[f64]>::to_vec).collect::<Stack>()
    });
    parts.collect()
}

/// The weighted rows, by these weights, and the picks; each product and sum rounded.
fn mixed(stack: &[Vec<f64>], mix: &RowMix, weight: impl Fn(f64) -> f64, round: impl Fn(f64) -> f64) -> Stack {
    let mut rows = vec![vec![0.0; stack.first().map_or(0, Vec::len)]; mix.num_weighted()];
    for round_of in mix.rounds() {
        let terms = round_of.slots.iter().zip(&round_of.weights);
        for (row, (slot, share)) in rows.iter_mut().zip(terms) {
            let summands = row.iter_mut().zip(&stack[*slot as usize]);
            summands.for_each(|(sum, x)| *sum = round(*sum + round(round(weight(*share)) * x)));
        }
    }
    rows.extend(mix.picks().iter().map(|slot| stack[*slot as usize].clone()));
    rows
}

/// What single precision makes of a number.
fn single(x: f64) -> f64 {
    f64::from(f32::from_f64(x))
}

/// The right combination, so that gradients find their way, with other rows in it; `None` leaves it as it is.
fn with_rows(deltas: &[&Rows<f32>], mix: &RowMix, rows: Option<Stack>) -> Result<VecRows> {
    let deltas: Vec<_> = deltas.iter().map(|delta| &delta.now).collect();
    let mut right = NestedVec::<f32>::combine(&deltas, mix)?;
    if let Some(rows) = rows {
        let ([n, dim], dtype) = (right.rows().shape(), right.rows().dtype());
        *right.0.rows_mut() = TokenRows::new(rows.concat(), n, dim)?.to_dtype(dtype);
    }
    Ok(right)
}

fn now<'a>(deltas: &'a [&Rows<f32>]) -> impl DoubleEndedIterator<Item = &'a VecRows> {
    deltas.iter().map(|delta| &delta.now)
}

/// Combinations.
macro_rules! combinations {
    ($(#[$doc:meta] $name:ident: |$deltas:ident, $mix:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            fn combine(&self, $deltas: &[&Rows<f32>], $mix: &RowMix) -> Result<VecRows> {
                $body
            }
        }
    )+ };
}

combinations! {
    /// Stacks the last adapter first.
    LastAdapterFirst: |deltas, mix| {
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas).rev()), mix, |weight| weight, single)))
    };
    /// Weighs all alike.
    WeightsIgnored: |deltas, mix| {
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas)), mix, |_| 0.5, single)))
    };
    /// Adds the rows up without taking the mean.
    Unnormalised: |deltas, mix| {
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas)), mix, |weight| weight * 2.0, single)))
    };
    /// Sums in half precision.
    SummedInHalf: |deltas, mix| {
        let half = |x: f64| bf16::from_f64(x).to_f64();
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas)), mix, |weight| weight, half)))
    };
    /// Sums in double precision and rounds at the end: a fused multiplication and addition.
    SummedInDouble: |deltas, mix| {
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas)), mix, |weight| weight, |x| x)))
    };
    /// Puts the rows that are taken as they are before the weighted ones.
    PicksFirst: |deltas, mix| {
        let mut rows = mixed(&stack(now(deltas)), mix, |weight| weight, single);
        rows.rotate_left(mix.num_weighted());
        with_rows(deltas, mix, Some(rows))
    };
    /// Forgets that the first summand counts: sums onto whatever was there.
    FirstSummandTwice: |deltas, mix| {
        let stack = stack(now(deltas));
        let mut rows = mixed(&stack, mix, |weight| weight, single);
        if let Some(first) = mix.rounds().first() {
            for (row, slot) in rows.iter_mut().zip(&first.slots) {
                row.iter_mut().zip(&stack[*slot as usize]).for_each(|(sum, x)| *sum = single(*sum + x));
            }
        }
        with_rows(deltas, mix, Some(rows))
    };
    /// Gives zeros a plus.
    MinusZeroLost: |deltas, mix| {
        let mut right = with_rows(deltas, mix, None)?;
        let values = right.0.rows_mut().as_mut_slice::<f32>().unwrap_or_default();
        values.iter_mut().for_each(|x| *x += 0.0);
        Ok(right)
    };
    /// Combines the rows that the adapters started with.
    StaleRows: |deltas, mix| {
        let first = stack(deltas.iter().map(|delta| &delta.first));
        with_rows(deltas, mix, Some(mixed(&first, mix, |weight| weight, single)))
    };
    /// Converts all rows to the type of the first.
    FirstsType: |deltas, mix| {
        let first = now(deltas).next().map_or(DType::F32, |rows| rows.rows().dtype());
        let rows = with_rows(deltas, mix, None)?;
        let rows = VecRows::new(rows.rows().to_dtype(first));
        with_rows(deltas, mix, Some(stack([&rows])))
    };
    /// Combines in single precision, whatever there is.
    AlwaysSingle: |deltas, mix| {
        with_rows(deltas, mix, Some(mixed(&stack(now(deltas)), mix, |weight| weight, single)))
    };
    /// Cuts the combination off the graph.
    Detached: |deltas, mix| Ok(VecRows::new(with_rows(deltas, mix, None)?.rows().clone()));
    /// Needs a buffer as large as a table.
    LargeBuffer: |deltas, mix| {
        std::hint::black_box(vec![0f32; deltas[0].embedding_dim() * 40_000]);
        with_rows(deltas, mix, None)
    };
}

/// The right backward pass of a lookup, of which each adapter then gets what `change` makes of its gradient; the adapter's
/// place in the layer comes along.
fn redistributed(
    layer: &Layer<Broken>,
    plan: &LookupPlan,
    upstream: &Matrix<f32>,
    gradients: &mut Gradients,
    change: impl Fn(usize, &[f32]) -> Option<Vec<f32>>,
) -> Result<()> {
    let mut right = Gradients::default();
    let rows = layer.rows_for(plan)?;
    let delta = rows.as_deref().map(|delta| &delta.now);
    right.add_lookup(delta, plan, upstream, layer.transform().scale)?;
    for (at, adapter) in layer.adapters().enumerate() {
        let leaf = &adapter.delta().now.0;
        let own = right.0.get(leaf).map(TokenRows::to_f32_vec).unwrap_or_default();
        if let Some(changed) = change(at, &own) {
            gradients.0.add(leaf, DType::F32, |sums| {
                let sums = sums.as_mut_slice::<f32>().unwrap_or_default().iter_mut();
                sums.zip(changed).for_each(|(sum, x)| *sum += x);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Which adapters are in use: an empty gradient says that the pass does not reach the adapter.
fn reached(own: &[f32]) -> Option<Vec<f32>> {
    Some(own.to_vec()).filter(|own| !own.is_empty())
}

/// Backward passes of lookups, by what becomes of each adapter's gradient.
macro_rules! redistributions {
    ($(#[$doc:meta] $name:ident: |$layer:ident, $at:pat_param, $own:ident| $body:expr;)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            #[allow(unused_variables)]
            fn lookup_backward(&self,
                $layer: &Layer<Broken>,
                plan: &LookupPlan,
                upstream: &Matrix<f32>,
                gradients: &mut Gradients,
            ) -> Result<()> {
                redistributed($layer, plan, upstream, gradients, |$at, $own| $body)
            }
        }
    )+ };
}

redistributions! {
    /// Lets only the first adapter train.
    FirstAdapterOnly: |layer, at, own| reached(own).filter(|_| at == 0);
    /// Gives an adapter nothing, not zeros, if no row of it got any.
    ZerosAreNothing: |layer, _, own| reached(own).filter(|own| own.iter().any(|x| *x != 0.0));
    /// Divides by a count of zero where no row counts.
    ZerosAreNan: |layer, _, own| {
        Some(reached(own)?.into_iter().map(|x| if x == 0.0 { f32::NAN } else { x }).collect())
    };
    /// Gives zeros, not nothing, to adapters that the batch does not see.
    AllAreReached: |layer, _, own| Some(own.to_vec());
    /// Gives weighted rows the whole gradient.
    SharesIgnored: |layer, _, own| {
        let weighted = matches!(layer.overlap(), trainable_tokens_core::Overlap::WeightedMean(_));
        Some(reached(own)?.into_iter().map(|x| if weighted { x * 2.0 } else { x }).collect())
    };
}

/// Counts how often an id occurs in the whole batch, not among the examples of the adapter.
pub(crate) struct FrequencyOfTheBatch;

impl Fault for FrequencyOfTheBatch {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let ids = plan.input_ids();
        let count = |id: u32| ids.iter().filter(|other| **other == id).count();
        let rows = layer.rows_for(plan)?;
        let (Some(rows), Some(own)) = (&rows, plan.grad_factors()) else {
            let delta = rows.as_deref().map(|delta| &delta.now);
            return gradients.add_lookup(delta, plan, upstream, layer.transform().scale);
        };
        let scale = layer.transform().scale.unwrap_or(1.0);
        let (dim, upstream) = (rows.embedding_dim(), upstream.to_token_rows()?.to_f32_vec());
        let positions = plan.grad_positions().iter().zip(plan.grad_slots());
        assert_eq!(own.len(), plan.grad_positions().len());
        Ok(gradients.0.add(&rows.now.0, DType::F32, |sums| {
            let sums = sums.as_mut_slice::<f32>().unwrap_or_default();
            for (position, slot) in positions {
                let (position, slot) = (*position as usize, *slot as usize);
                let factor = f32::from_f64(scale / count(ids[position]) as f64);
                let sum = sums[slot * dim..][..dim].iter_mut();
                sum.zip(&upstream[position * dim..][..dim])
                    .for_each(|(sum, x)| *sum += x * factor);
            }
            Ok(())
        })?)
    }
}

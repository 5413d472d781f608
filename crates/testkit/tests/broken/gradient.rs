//! Backward passes of the lookup that go wrong.

use half::f16;
use trainable_tokens_core::{DType, DeltaStore, Element, EmbeddingSource, LookupPlan, TokenId, WriteRows};
use trainable_tokens_nested_vec::{Gradients, Matrix, Result};
use trainable_tokens_testkit::Layer;

use crate::faulty::{Broken, Fault, Faulty};

/// Position, slot and factor of every contribution.
fn contributions<T: Faulty>(layer: &Layer<Broken<T>>, plan: &LookupPlan) -> Vec<(usize, usize, f64)> {
    let scale = layer.transform().scale.unwrap_or(1.0);
    let pairs = plan.grad_positions().iter().zip(plan.grad_slots()).enumerate();
    let all = pairs.map(|(at, (position, slot))| {
        let own = plan.grad_factors().map_or(1.0, |factors| factors[at]);
        (*position as usize, *slot as usize, own * scale)
    });
    all.collect()
}

/// Sums these contributions, as `add` says.
fn sum_up<T: Faulty>(
    layer: &Layer<Broken<T>>,
    plan: &LookupPlan,
    upstream: &Matrix<T>,
    gradients: &mut Gradients,
    contributions: &[(usize, usize, f64)],
    add: impl Fn(f32, f32) -> f32,
) -> Result<()> {
    let Some(rows) = layer.rows_for(plan)? else {
        return Ok(());
    };
    let upstream = upstream.to_token_rows()?.to_f32_vec();
    let dim = rows.embedding_dim();
    Ok(gradients.0.add(&rows.now.0, DType::F32, |sums| {
        let sums = sums.as_mut_slice::<f32>().unwrap_or_default();
        for (position, slot, factor) in contributions {
            let upstream = upstream[position * dim..][..dim].iter();
            for (sum, x) in sums[slot * dim..][..dim].iter_mut().zip(upstream) {
                *sum = add(*sum, x * f32::from_f64(*factor));
            }
        }
        Ok(())
    })?)
}

/// Backward passes that sum other contributions.
macro_rules! contributing {
    ($(#[$doc:meta] $name:ident: |$layer:ident, $plan:ident, $all:ident| $change:block)+) => { $(
        #[$doc]
        pub(crate) struct $name;

        impl Fault for $name {
            #[allow(unused_variables, unused_mut)]
            fn lookup_backward(&self,
                $layer: &Layer<Broken>,
                $plan: &LookupPlan,
                upstream: &Matrix<f32>,
                gradients: &mut Gradients,
            ) -> Result<()> {
                let mut $all = contributions($layer, $plan);
                $change
                sum_up($layer, $plan, upstream, gradients, &$all, |sum, x| sum + x)
            }
        }
    )+ };
}

contributing! {
    /// Gives the gradient to the slot before.
    OffByOneSlot: |layer, plan, all| {
        all.iter_mut().for_each(|(_, slot, _)| *slot = (*slot + plan.num_slots() - 1) % plan.num_slots());
    }
    /// Hands the gradient out in the order of the ids.
    SortedById: |layer, plan, all| {
        let ids = layer.tokens().ids();
        let rank = |slot: usize| ids.iter().filter(|id| **id < ids[slot]).count();
        all.iter_mut().for_each(|(_, slot, _)| *slot = rank(*slot));
    }
    /// Keeps the last of equal ids only: a scatter that assigns.
    RepeatsOverwritten: |layer, plan, all| {
        let every = all.clone();
        all.retain(|(position, slot, _)| {
            !every.iter().any(|(later, other, _)| later > position && other == slot)
        });
    }
    /// Trains the padding token whatever the rule.
    PaddingTrains: |layer, plan, all| {
        if plan.grad_factors().is_none() {
            let scale = layer.transform().scale.unwrap_or(1.0);
            let pairs = plan.positions().iter().zip(plan.slots());
            all = pairs.map(|(position, slot)| (*position as usize, *slot as usize, scale)).collect();
        }
    }
    /// Drops the padding token whatever the rule.
    PaddingNeverTrains: |layer, plan, all| {
        let padding = layer.options().padding.map(|padding| padding.token.0);
        all.retain(|(position, _, _)| Some(plan.input_ids()[*position]) != padding);
    }
    /// Forgets the scale.
    Unscaled: |layer, plan, all| {
        let scale = layer.transform().scale.unwrap_or(1.0);
        all.iter_mut().for_each(|(_, _, factor)| *factor /= scale);
    }
    /// Scales twice.
    ScaledTwice: |layer, plan, all| {
        let scale = layer.transform().scale.unwrap_or(1.0);
        all.iter_mut().for_each(|(_, _, factor)| *factor *= scale);
    }
    /// Divides by how many trainable tokens the batch has, not by how often it has this one.
    FrequencyOfAll: |layer, plan, all| {
        if plan.grad_factors().is_some() {
            let scale = layer.transform().scale.unwrap_or(1.0);
            all.iter_mut().for_each(|(_, _, factor)| *factor = scale / plan.slots().len() as f64);
        }
    }
    /// Never divides by the frequency.
    FrequencyIgnored: |layer, plan, all| {
        let scale = layer.transform().scale.unwrap_or(1.0);
        all.iter_mut().for_each(|(_, _, factor)| *factor = scale);
    }
    /// Averages over the batch.
    Averaged: |layer, plan, all| {
        all.iter_mut().for_each(|(_, _, factor)| *factor /= plan.len() as f64);
    }
    /// Lets the gradient through the factor that shortened the row.
    MaxNormTrainsThrough: |layer, plan, all| {
        if let Some(max_norm) = layer.options().max_norm {
            let norms = layer.rows()?.row_norms();
            let shortened = |slot: usize| max_norm.factor(norms[slot]).unwrap_or(1.0);
            all.iter_mut().for_each(|(_, slot, factor)| *factor *= shortened(*slot));
        }
    }
    /// Makes the gradient of the whole table first.
    DenseGradient: |layer, plan, all| {
        let (v, dim) = (layer.source().vocab_size(), layer.source().embedding_dim());
        std::hint::black_box(vec![0f32; v * dim]);
    }
}

/// Forgets what an earlier lookup of the pass gave.
pub(crate) struct LookupOverwrites;

impl Fault for LookupOverwrites {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        *gradients = Gradients::default();
        sum_up(
            layer,
            plan,
            upstream,
            gradients,
            &contributions(layer, plan),
            |sum, x| sum + x,
        )
    }
}

/// Sums in half precision.
pub(crate) struct HalfSums;

impl Fault<f16> for HalfSums {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken<f16>>,
        plan: &LookupPlan,
        upstream: &Matrix<f16>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let add = |sum, x| f16::from_f32(sum + x).to_f32();
        sum_up(layer, plan, upstream, gradients, &contributions(layer, plan), add)
    }
}

/// Gives nothing, not zeros, if the batch has no trainable token.
pub(crate) struct AbsentIsNothing;

impl Fault for AbsentIsNothing {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if plan.grad_positions().is_empty() {
            return Ok(());
        }
        sum_up(
            layer,
            plan,
            upstream,
            gradients,
            &contributions(layer, plan),
            |sum, x| sum + x,
        )
    }
}

/// Leaves slots without an occurrence as they come.
pub(crate) struct AbsentIsGarbage;

impl Fault for AbsentIsGarbage {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        sum_up(
            layer,
            plan,
            upstream,
            gradients,
            &contributions(layer, plan),
            |sum, x| sum + x,
        )?;
        let Some(rows) = layer.rows_for(plan)? else {
            return Ok(());
        };
        Ok(gradients.0.add(&rows.now.0, DType::F32, |sums| {
            let dim = sums.embedding_dim();
            let sums = sums.as_mut_slice::<f32>().unwrap_or_default();
            for (slot, row) in sums.chunks_exact_mut(dim).enumerate() {
                if !plan.slots().iter().any(|present| *present as usize == slot) {
                    row.fill(1e-3);
                }
            }
            Ok(())
        })?)
    }
}

/// Lets rows train that are merged.
pub(crate) struct MergedStillTrains;

impl Fault for MergedStillTrains {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        gradients.add_lookup(Some(&layer.delta()?.now), plan, upstream, layer.transform().scale)
    }
}

/// Trains the frozen rows of the batch, too.
pub(crate) struct BaseTrains;

impl Fault for BaseTrains {
    fn lookup_backward(
        &self,
        layer: &Layer<Broken>,
        plan: &LookupPlan,
        upstream: &Matrix<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        sum_up(
            layer,
            plan,
            upstream,
            gradients,
            &contributions(layer, plan),
            |sum, x| sum + x,
        )?;
        let ids: Vec<TokenId> = plan.token_ids().collect();
        let mut rows = layer.source().read_rows(&ids)?;
        rows.scale(0.999);
        layer.source().now.borrow_mut().write_rows(&ids, &rows)
    }
}

//! Adapters to try together, and the dense definition of what they do.

use trainable_tokens_core::{
    BackendError, DType, DeltaStore, Element, ErrorKind, Overlap, TokenRows, TokenSet,
};

use crate::failure::{Exact, equal};
use crate::world::{World, noise, overwritten, select};
use crate::{Failure, Harness, Layer};

/// Names of adapters, of as different kinds as a name may be.
pub(super) const NAMES: [&str; 3] = ["default", "second one", "trøisième-3"];
/// Weights of adapters: not normalised, and of very different sizes.
pub(super) const WEIGHTS: [f64; 3] = [0.3, 2.0, 0.05];

/// An adapter as a case knows it.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) tokens: Vec<u32>,
    pub(super) rows: TokenRows,
}

/// Three adapters that share the world's tokens out among them; some may get none.
pub(super) fn disjoint(world: &World, dtype: DType) -> Vec<Member> {
    let mut dice = Dice::new(world.seed);
    let mut shares = [const { Vec::new() }; 3];
    for id in &world.tokens {
        shares[dice.below(3)].push(*id);
    }
    members(world, shares, dtype)
}

/// Three adapters, each of about two thirds of the world's tokens, in orders of their own.
pub(super) fn overlapping(world: &World, dtype: DType) -> Vec<Member> {
    let mut dice = Dice::new(world.seed);
    let shares = [0, 1, 2].map(|at| {
        let mut share: Vec<u32> = world.tokens.clone();
        share.retain(|_| dice.below(3) > 0);
        let turn = share.len().min(at);
        share.rotate_left(turn);
        share
    });
    members(world, shares, dtype)
}

fn members(world: &World, shares: [Vec<u32>; 3], dtype: DType) -> Vec<Member> {
    let members = NAMES.into_iter().zip(shares).zip(1u64..);
    let members = members.map(|((name, tokens), salt)| Member {
        name,
        rows: noise(world.seed ^ (salt << 20), dtype, tokens.len(), world.d),
        tokens,
    });
    members.collect()
}

/// Whether the backend lets rows train in this type over the harness's tables (SPEC.md T10: it may refuse to).
pub(super) fn trains_in<H: Harness>(dtype: DType) -> Result<bool, Failure> {
    let source = H::source(&TokenRows::zeros(H::DTYPE, 1, 1))?;
    match Layer::<H>::with_rows(source, TokenSet::new([0], 1)?, &TokenRows::zeros(dtype, 1, 1)) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
        layer => {
            equal("the type of the rows", &layer?.delta()?.dtype(), &dtype)?;
            Ok(true)
        }
    }
}

/// The names of adapters, in their order.
pub(super) fn names(members: &[Member]) -> Vec<&'static str> {
    members.iter().map(|member| member.name).collect()
}

/// A layer over the world's table with these adapters, none of them active.
pub(super) fn idle<H: Harness>(world: &World, members: &[Member]) -> Result<Layer<H>, Failure> {
    over::<H>(&world.table::<H>(), members)
}

/// As [`idle`], over another table.
pub(super) fn over<H: Harness>(table: &TokenRows, members: &[Member]) -> Result<Layer<H>, Failure> {
    let mut layer = Layer::<H>::frozen(H::source(table)?)?;
    for Member { name, tokens, rows } in members {
        let tokens = TokenSet::new(tokens.iter().copied(), table.num_rows())?;
        layer.add_adapter_with_rows(name, tokens, rows)?;
    }
    Ok(layer)
}

/// A layer over the world's table with these adapters, all of them active.
pub(super) fn active<H: Harness>(
    world: &World,
    members: &[Member],
    overlap: &Overlap,
) -> Result<Layer<H>, Failure> {
    let mut layer = idle::<H>(world, members)?;
    layer.activate_overlapping(&names(members), overlap.clone())?;
    Ok(layer)
}

/// What the row of a token is made of: adapters, slots and shares (SPEC.md A5 to A7).
fn terms(members: &[Member], overlap: &Overlap, id: u32) -> Vec<(usize, usize, f64)> {
    let slot = |member: &Member| member.tokens.iter().position(|token| *token == id);
    let holders = members.iter().enumerate();
    let holders: Vec<_> = holders
        .filter_map(|(at, member)| Some((at, slot(member)?)))
        .collect();
    match overlap {
        Overlap::WeightedMean(weights) if holders.len() > 1 => {
            let largest = holders.iter().fold(0f64, |most, (at, _)| most.max(weights[*at]));
            let sum: f64 = holders.iter().map(|(at, _)| weights[*at] / largest).sum();
            let share = |(at, slot): &(usize, usize)| (*at, *slot, weights[*at] / largest / sum);
            holders.iter().map(share).collect()
        }
        _ => holders
            .last()
            .map(|(at, slot)| (*at, *slot, 1.0))
            .into_iter()
            .collect(),
    }
}

/// The table that a layer stands for in which these adapters, none of them merged, are active.
pub(super) fn in_effect(
    table: &TokenRows,
    members: &[Member],
    overlap: &Overlap,
) -> Result<TokenRows, Failure> {
    let double = members.iter().any(|member| member.rows.dtype() == DType::F64);
    // Products of two, and sums of two, single numbers are rounded once in this way (SPEC.md A7, A8, R8).
    let round = |x: f64| if double { x } else { f64::from(f32::from_f64(x)) };
    let mut dense = table.clone();
    for id in (0u32..).take(table.num_rows()) {
        let terms = terms(members, overlap, id);
        let row = match terms[..] {
            [] => continue,
            [(at, slot, _)] => select(&members[at].rows, &[u32::try_from(slot)?])?,
            _ => {
                let mut sum: Vec<f64> = Vec::new();
                for (at, slot, share) in terms {
                    let row = Exact::of(&members[at].rows);
                    let products = row.row(slot).iter().map(|x| round(round(share) * x));
                    sum = if sum.is_empty() {
                        products.collect()
                    } else {
                        sum.iter().zip(products).map(|(sum, x)| round(sum + x)).collect()
                    };
                }
                TokenRows::new(sum, 1, table.embedding_dim())?
            }
        };
        dense = overwritten(&dense, &[id], &row)?;
    }
    Ok(dense)
}

/// What of the whole table's gradient reaches the rows of each adapter.
pub(super) fn shares(members: &[Member], overlap: &Overlap, dense: &Exact) -> Vec<Exact> {
    let of = |(at, member): (usize, &Member)| {
        let mut own = Exact::zeros(member.tokens.len(), dense.shape[1]);
        for (slot, id) in member.tokens.iter().enumerate() {
            let terms = terms(members, overlap, *id);
            if let Some((_, _, share)) = terms.iter().find(|term| term.0 == at) {
                let pairs = own.row_mut(slot).iter_mut().zip(dense.row(*id as usize));
                pairs.for_each(|(own, x)| *own = share * x);
            }
        }
        own
    };
    members.iter().enumerate().map(of).collect()
}

/// Adds the gradient of a lookup's output to that of the whole table, each position multiplied by its own weight.
pub(super) fn add_lookup(
    dense: &mut Exact,
    ids: &[u32],
    upstream: &TokenRows,
    weight: impl Fn(usize) -> f64,
) {
    let upstream = Exact::of(upstream);
    for (at, id) in ids.iter().enumerate() {
        let pairs = dense.row_mut(*id as usize).iter_mut().zip(upstream.row(at));
        pairs.for_each(|(sum, x)| *sum += weight(at) * x);
    }
}

/// Adds one gradient to another.
pub(super) fn add(sum: &mut Exact, other: &Exact) {
    let pairs = sum.values.iter_mut().zip(&other.values);
    pairs.for_each(|(sum, x)| *sum += x);
}

/// Numbers that follow from a seed.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one, below `n`.
    pub(super) fn below(&mut self, n: u64) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 33) % n).unwrap_or_default()
    }
}

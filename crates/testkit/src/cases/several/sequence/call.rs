//! The calls of a sequence.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use trainable_tokens_core::{
    DType, EmbeddingSource, MergeCheck, Overlap, Sgd, SgdConfig, TokenRows, TokenSet,
};

use crate::world::noise;
use crate::{Error, Harness, Layer};

/// Names to choose from; the last one is no name.
const NAMES: [&str; 5] = ["default", "b", "c", "d", "e.e"];
/// Ids of a mixed batch, as many as its three examples need.
const MIXED_IDS: usize = 6;
/// What a step multiplies the gradient by.
pub(super) const RATE: f64 = 0.5;

/// A call of the layer. Token ids are taken modulo the vocabulary, and each once.
#[derive(Clone, Debug)]
pub(super) enum Call {
    AddFromTable {
        name: &'static str,
        tokens: Vec<u32>,
    },
    AddWithRows {
        name: &'static str,
        tokens: Vec<u32>,
        rows: Values,
    },
    Activate {
        names: Vec<&'static str>,
        overlap: Overlap,
    },
    Disable,
    Enable,
    MergeActive(MergeCheck),
    Merge {
        names: Vec<&'static str>,
        overlap: Overlap,
        check: MergeCheck,
    },
    Unmerge,
    Delete(&'static str),
    SetRows {
        name: &'static str,
        rows: Values,
    },
    SetRowsOfActive(Values),
    Step {
        name: &'static str,
        gradient: Values,
    },
    Mixed {
        ids: Vec<u32>,
        adapters: Vec<Option<&'static str>>,
    },
}

/// Rows to come, once their number is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values {
    seed: u64,
    /// Whether they train in the table's type, not in the default one.
    in_the_tables_type: bool,
    /// A value among them that is not finite in every type.
    large: Option<f64>,
}

impl Values {
    pub(super) fn rows(self, table: DType, k: usize, d: usize) -> TokenRows {
        let dtype = if self.in_the_tables_type {
            table
        } else {
            table.default_row_dtype()
        };
        self.rows_of(dtype, k, d)
    }

    pub(super) fn rows_of(self, dtype: DType, k: usize, d: usize) -> TokenRows {
        let rows = noise(self.seed, DType::F64, k, d);
        let mut values = rows.to_f64_vec();
        if let (Some(large), Some(value)) = (self.large, values.last_mut()) {
            *value = large;
        }
        TokenRows::new(values, k, d).map_or(rows, |rows| rows.to_dtype(dtype))
    }
}

/// Ids below `v`, each once.
pub(super) fn distinct(tokens: &[u32], v: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    for id in tokens.iter().map(|id| id % u32::try_from(v).unwrap_or(u32::MAX)) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

fn name() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just(NAMES[0]), 4 => Just(NAMES[1]), 4 => Just(NAMES[2]), 4 => Just(NAMES[3]), 1 => Just(NAMES[4])]
}

fn names() -> impl Strategy<Value = Vec<&'static str>> {
    prop_oneof![
        8 => subsequence(NAMES[..4].to_vec(), 0..4).prop_shuffle(),
        1 => Just(vec![NAMES[0]]),
        1 => proptest::collection::vec(name(), 2..4),
    ]
}

fn tokens() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0u32..9, 0..5)
}

fn values() -> impl Strategy<Value = Values> {
    let large = prop_oneof![6 => Just(None), 1 => Just(Some(f64::INFINITY)), 1 => Just(Some(3.4e38)), 1 => Just(Some(65_520.0))];
    (any::<u64>().no_shrink(), any::<bool>(), large).prop_map(|(seed, in_the_tables_type, large)| Values {
        seed,
        in_the_tables_type,
        large,
    })
}

fn check() -> impl Strategy<Value = MergeCheck> {
    select(vec![MergeCheck::Unchecked, MergeCheck::Finite])
}

/// Names, and a choice for overlaps that mostly suits them.
fn choice() -> impl Strategy<Value = (Vec<&'static str>, Overlap)> {
    (
        names(),
        0..8,
        proptest::collection::vec(select(vec![1.0, 0.25, 3.0, 7e200]), 4),
    )
        .prop_map(|(names, kind, mut weights)| {
            weights.truncate(names.len());
            let overlap = match kind {
                0..4 => Overlap::LastWins,
                4 => Overlap::Refuse,
                5 => {
                    weights.push(if names.is_empty() { 1.0 } else { 0.5 });
                    Overlap::WeightedMean(weights)
                }
                _ => Overlap::WeightedMean(weights),
            };
            (names, overlap)
        })
}

/// Mostly all adapters to begin with, and about thirty calls; a sequence that fails is shortened.
pub(super) fn calls() -> impl Strategy<Value = Vec<Call>> {
    let add = |name: &'static str| {
        (tokens(), values()).prop_map(move |(tokens, rows)| Call::AddWithRows { name, tokens, rows })
    };
    let all = [NAMES[0], NAMES[1], NAMES[2], NAMES[3]].map(add);
    let first = prop_oneof![1 => Just(Vec::new()), 4 => all.prop_map(Vec::from)];
    let mixed = (
        proptest::collection::vec(0u32..9, MIXED_IDS),
        proptest::collection::vec(proptest::option::weighted(0.7, name()), 3),
    );
    let call = prop_oneof![
        2 => (name(), tokens()).prop_map(|(name, tokens)| Call::AddFromTable { name, tokens }),
        2 => name().prop_flat_map(add),
        6 => choice().prop_map(|(names, overlap)| Call::Activate { names, overlap }),
        1 => Just(Call::Disable),
        2 => Just(Call::Enable),
        2 => check().prop_map(Call::MergeActive),
        6 => (choice(), check()).prop_map(|((names, overlap), check)| Call::Merge { names, overlap, check }),
        6 => Just(Call::Unmerge),
        1 => name().prop_map(Call::Delete),
        2 => (name(), values()).prop_map(|(name, rows)| Call::SetRows { name, rows }),
        1 => values().prop_map(Call::SetRowsOfActive),
        2 => (name(), values()).prop_map(|(name, gradient)| Call::Step { name, gradient }),
        2 => mixed.prop_map(|(ids, adapters)| Call::Mixed { ids, adapters }),
    ];
    (first, proptest::collection::vec(call, 1..60)).prop_map(|(first, calls)| [first, calls].concat())
}

impl Call {
    /// Makes the call; a mixed batch has rows to show.
    pub(super) fn make<H: Harness>(&self, layer: &mut Layer<H>) -> Result<Option<TokenRows>, Error<H>> {
        let (v, d) = (layer.source().vocab_size(), layer.source().embedding_dim());
        match self {
            Self::AddFromTable { name, tokens } => {
                layer.add_adapter(name, TokenSet::new(distinct(tokens, v), v)?)?;
            }
            Self::AddWithRows { name, tokens, rows } => {
                let tokens = TokenSet::new(distinct(tokens, v), v)?;
                let rows = rows.rows(H::DTYPE, tokens.len(), d);
                layer.add_adapter_with_rows(name, tokens, &rows)?;
            }
            Self::Activate { names, overlap } => layer.activate_overlapping(names, overlap.clone())?,
            Self::Disable => layer.disable()?,
            Self::Enable => layer.enable(),
            Self::MergeActive(check) => layer.merge_checked(*check)?,
            Self::Merge {
                names,
                overlap,
                check,
            } => layer.merge_adapters(names, overlap, *check)?,
            Self::Unmerge => layer.unmerge()?,
            Self::Delete(name) => drop(layer.delete_adapter(name)?),
            Self::SetRows { name, rows } => {
                let adapter = layer.adapter_mut(name)?;
                let rows = rows.rows(H::DTYPE, adapter.tokens().len(), d);
                adapter.set_rows(&rows)?;
            }
            Self::SetRowsOfActive(rows) => {
                let k = layer.active_adapter()?.tokens().len();
                layer.set_rows(&rows.rows(H::DTYPE, k, d))?;
            }
            Self::Step { name, gradient } => {
                let adapter = layer.adapter_mut(name)?;
                let gradient = gradient.rows(H::DTYPE, adapter.tokens().len(), d);
                let config = SgdConfig {
                    lr: RATE,
                    ..SgdConfig::default()
                };
                adapter.step_with(gradient, &mut Sgd::new(config)?, &mut [])?;
            }
            Self::Mixed { ids, adapters } => {
                let ids = Self::mixed_ids(ids, v);
                let plan = layer.plan_mixed(&ids, adapters)?;
                return Ok(Some(H::read(&layer.lookup_planned(&plan)?)?));
            }
        }
        Ok(None)
    }

    pub(super) fn mixed_ids(ids: &[u32], v: usize) -> Vec<u32> {
        ids.iter()
            .map(|id| id % u32::try_from(v).unwrap_or(u32::MAX))
            .collect()
    }
}

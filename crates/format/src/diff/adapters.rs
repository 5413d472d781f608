//! Two adapters, compared token by token.

use std::collections::{BTreeMap, BTreeSet};

use trainable_tokens_core::TokenId;

use super::{RowDiff, TensorDiff, TensorDifference};
use crate::adapter::{Adapter, AdapterModule};
use crate::error::{Error, Result};

/// What differs between two adapters.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AdapterDiff {
    /// Every module with rows, the same or not: those of the first in its order, then those that only the second has.
    pub modules: Vec<ModuleDiff>,
    /// Tensors that are no rows, such as LoRA's weights, and differ; by name.
    pub tensors: Vec<TensorDiff>,
}

/// The rows of one module in two adapters.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModuleDiff {
    /// The module's path in the model.
    pub path: String,
    /// The tokens that both train, in the first's slot order.
    pub rows: Vec<RowDiff>,
    /// The tokens that only the first trains, in slot order.
    pub only_in_first: Vec<TokenId>,
    /// The tokens that only the second trains, in slot order.
    pub only_in_second: Vec<TokenId>,
}

impl AdapterDiff {
    /// Compares the rows of two adapters, token by token whatever their slots, and their other tensors.
    ///
    /// # Errors
    ///
    /// [`Error::TensorShape`] if the rows of a module have different lengths.
    pub fn between(first: &Adapter, second: &Adapter) -> Result<Self> {
        let mut diff = Self::default();
        for module in first.modules() {
            let other = partner(module, second);
            diff.modules.push(match other {
                Some(other) => ModuleDiff::between(module, other, second)?,
                None => ModuleDiff::of(module, module.token_ids(), Vec::new()),
            });
        }
        for module in second.modules() {
            if partner(module, first).is_none() {
                let only = module.token_ids();
                diff.modules.push(ModuleDiff::of(module, Vec::new(), only));
            }
        }
        let names: BTreeSet<&str> = first.extra_tensors().chain(second.extra_tensors()).collect();
        for name in names {
            let difference = match (first.extra_tensor(name), second.extra_tensor(name)) {
                (Ok(first), Ok(second)) => TensorDifference::of(&first, &second),
                (Ok(_), Err(_)) => Some(TensorDifference::OnlyInFirst),
                (Err(_), _) => Some(TensorDifference::OnlyInSecond),
            };
            let tensor = name.to_owned();
            diff.tensors
                .extend(difference.map(|difference| TensorDiff { tensor, difference }));
        }
        Ok(diff)
    }

    /// Whether nothing differs: rows are the same numbers, and other tensors the same bits.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.modules.iter().all(ModuleDiff::is_empty)
    }
}

/// The module of the other adapter with rows for the same path, its own or one that is tied in the file.
fn partner<'a>(module: &AdapterModule, other: &'a Adapter) -> Option<&'a AdapterModule> {
    module.all_paths().find_map(|path| other.module(path))
}

impl ModuleDiff {
    fn of(module: &AdapterModule, only_in_first: Vec<TokenId>, only_in_second: Vec<TokenId>) -> Self {
        Self {
            path: module.path().to_owned(),
            rows: Vec::new(),
            only_in_first,
            only_in_second,
        }
    }

    fn between(first: &AdapterModule, second: &AdapterModule, of: &Adapter) -> Result<Self> {
        let (columns, have) = (first.rows().embedding_dim(), second.rows().embedding_dim());
        if columns != have {
            return Err(Error::TensorShape {
                path: of.origin().to_owned(),
                tensor: second.path().to_owned(),
                expected: format!("rows of {columns} columns, as the other adapter has"),
                got: second.rows().shape().to_vec(),
            });
        }
        let known: BTreeSet<TokenId> = first.token_ids().into_iter().collect();
        let slots: BTreeMap<TokenId, usize> = second.token_ids().into_iter().zip(0..).collect();
        let only_in_second = second.token_ids().into_iter().filter(|id| !known.contains(id));
        let mut diff = Self::of(first, Vec::new(), only_in_second.collect());
        for (slot, id) in first.token_ids().into_iter().enumerate() {
            let other = slots.get(&id).and_then(|slot| second.rows().row(*slot));
            match first.rows().row(slot).zip(other) {
                Some((a, b)) => diff.rows.push(RowDiff::of(id, a, b)),
                None => diff.only_in_first.push(id),
            }
        }
        Ok(diff)
    }

    /// How many tokens both train, to different rows.
    pub fn changed(&self) -> usize {
        self.rows.iter().filter(|row| !row.is_same).count()
    }

    /// Whether both train the same tokens to the same rows.
    pub fn is_empty(&self) -> bool {
        self.changed() == 0 && self.only_in_first.is_empty() && self.only_in_second.is_empty()
    }
}

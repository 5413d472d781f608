//! Token ids, slots and the set of tokens that train.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::{Error, Result};

/// An integer that names a token: a row of the embedding table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The row of the table that the id names.
    pub const fn row(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u32> for TokenId {
    fn from(id: u32) -> Self {
        Self(id)
    }
}

/// The place of a token among the trainable rows: row `slot` of the delta belongs to `token_indices[slot]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

/// What the gradient of a trained row does when its token is the table's `padding_idx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PaddingRule {
    /// torch's `nn.Embedding`: the row is used by the lookup but gets no gradient from it.
    NoLookupGradient,
    /// The row trains like any other.
    Train,
}

/// The table's padding token and the rule for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// `padding_idx` of the table.
    pub token: TokenId,
    /// What becomes of its gradient.
    pub rule: PaddingRule,
}

/// The trainable tokens of one table, validated, in the order of their slots.
///
/// Order is part of the file format: row `i` of the delta belongs to `token_indices[i]`. Ids are never sorted
/// and never deduplicated. Membership costs one load from a table of `V` 32-bit integers, built once.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSet {
    ids: Arc<[TokenId]>,
    /// Shared by clones; empty without ids.
    slot_of: Arc<Vec<u32>>,
    vocab_size: usize,
    /// Of the ids in their order and the vocabulary size: plans are told apart by it.
    fingerprint: u64,
}

const ABSENT: u32 = u32::MAX;

impl TokenSet {
    /// Validates `ids` against a table of `vocab_size` rows.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutOfRange`] for an id at or above `vocab_size`, [`Error::DuplicateToken`] for a repeated
    /// one, [`Error::VocabularyTooLarge`] if ids of 32 bits cannot name every row.
    pub fn new(ids: impl IntoIterator<Item = u32>, vocab_size: usize) -> Result<Self> {
        if u32::try_from(vocab_size).is_err() {
            return Err(Error::VocabularyTooLarge { vocab_size });
        }
        let mut slot_of = Vec::new();
        let mut set = Vec::new();
        for (slot, id) in (0u32..).zip(ids) {
            if slot_of.is_empty() {
                slot_of.resize(vocab_size, ABSENT);
            }
            let entry = slot_of.get_mut(id as usize).ok_or(Error::TokenOutOfRange {
                id: i64::from(id),
                vocab_size,
            })?;
            if *entry != ABSENT {
                return Err(Error::DuplicateToken {
                    id: TokenId(id),
                    first: *entry as usize,
                    second: slot as usize,
                });
            }
            *entry = slot;
            set.push(TokenId(id));
        }
        let mut hasher = DefaultHasher::new();
        (&set, vocab_size).hash(&mut hasher);
        Ok(Self {
            ids: set.into(),
            slot_of: Arc::new(slot_of),
            vocab_size,
            fingerprint: hasher.finish(),
        })
    }

    /// The ids in slot order.
    pub fn ids(&self) -> &[TokenId] {
        &self.ids
    }

    /// The ids in slot order, as plain integers.
    pub fn to_vec(&self) -> Vec<u32> {
        self.ids.iter().map(|id| id.0).collect()
    }

    /// How many tokens train (`k`).
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether no token trains.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Rows of the table that the ids were validated against (`V`).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The slot of `id`, if it trains.
    pub fn slot(&self, id: TokenId) -> Option<Slot> {
        self.slot_of
            .get(id.row())
            .filter(|&&slot| slot != ABSENT)
            .map(|&slot| Slot(slot as usize))
    }

    /// Whether `id` trains.
    pub fn contains(&self, id: TokenId) -> bool {
        self.slot(id).is_some()
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The raw table behind [`Self::slot`]: `Ok(None)` for a frozen row.
    pub(crate) fn slot_index(&self, id: u32) -> Result<Option<u32>> {
        let row = id as usize;
        if row >= self.vocab_size {
            return Err(Error::TokenOutOfRange {
                id: i64::from(id),
                vocab_size: self.vocab_size,
            });
        }
        Ok(self.slot_of.get(row).copied().filter(|slot| *slot != ABSENT))
    }
}

impl fmt::Debug for TokenSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSet")
            .field("ids", &self.to_vec())
            .field("vocab_size", &self.vocab_size())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept() {
        let set = TokenSet::new([29, 3, 17], 37).unwrap();
        assert_eq!(set.to_vec(), [29, 3, 17]);
        assert_eq!(set.slot(TokenId(17)), Some(Slot(2)));
        assert_eq!(set.slot(TokenId(4)), None);
        assert_eq!(set.slot(TokenId(37)), None);
    }

    #[test]
    fn the_culprit_is_named() {
        assert_eq!(
            TokenSet::new([1, 37], 37),
            Err(Error::TokenOutOfRange {
                id: 37,
                vocab_size: 37
            })
        );
        assert_eq!(
            TokenSet::new([5, 1, 5], 37),
            Err(Error::DuplicateToken {
                id: TokenId(5),
                first: 0,
                second: 2
            })
        );
    }

    #[test]
    fn empty_and_full_sets_are_valid() {
        let empty = TokenSet::new([], 5).unwrap();
        assert!(empty.is_empty() && !empty.contains(TokenId(4)));
        assert_eq!((empty.vocab_size(), empty.slot_index(4)), (5, Ok(None)));
        assert!(empty.slot_index(5).is_err() && TokenSet::new([0], 0).is_err());
        assert_eq!(TokenSet::new((0..5).rev(), 5).unwrap().to_vec(), [4, 3, 2, 1, 0]);
    }
}

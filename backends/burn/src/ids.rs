//! Token ids in tensors.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Int, Tensor};
use trainable_tokens_core::{Error as CoreError, TokenSet};

use crate::Result;

/// The ids of a tensor of any integer type, shape and device, flattened. An id that no `u32` can hold is refused
/// here, one at or above `vocab_size` by whoever looks it up.
pub(crate) fn read_ids<const D: usize>(ids: Tensor<D, Int>, vocab_size: usize) -> Result<Vec<u32>> {
    let narrow = |id: i64| {
        let refused = CoreError::TokenOutOfRange { id, vocab_size };
        u32::try_from(id).map_err(|_| refused.into())
    };
    read_integers(ids)?.into_iter().map(narrow).collect()
}

/// The values of a tensor of any integer type, shape and device, flattened; those that no `i64` can hold are its largest.
pub(crate) fn read_integers<const D: usize>(values: Tensor<D, Int>) -> Result<Vec<i64>> {
    let data = values.try_into_data()?;
    if data.dtype() == DType::U64 {
        // Burn's conversion panics where a value does not fit.
        let values = data.try_into_vec::<u64>()?.into_iter();
        return Ok(values
            .map(|value| i64::try_from(value).unwrap_or(i64::MAX))
            .collect());
    }
    Ok(data.try_into_vec_as::<i64>()?)
}

/// The validated token set of a parameter of ids.
///
/// A record that is loaded replaces the parameter, and with it its burn id: then the set is read anew.
pub(crate) struct TokenCache(Mutex<(ParamId, TokenSet)>);

impl TokenCache {
    pub(crate) fn new(ids: &Param<Tensor<1, Int>>, tokens: TokenSet) -> Self {
        Self(Mutex::new((ids.id, tokens)))
    }

    /// The set of `ids`, for a table of `vocab_size` rows.
    ///
    /// # Errors
    ///
    /// For ids of a record that are out of range or given twice.
    pub(crate) fn get(&self, ids: &Param<Tensor<1, Int>>, vocab_size: usize) -> Result<TokenSet> {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.0 != ids.id {
            let tokens = TokenSet::new(read_ids(ids.val(), vocab_size)?, vocab_size)?;
            *cached = (ids.id, tokens);
        }
        Ok(cached.1.clone())
    }
}

impl Clone for TokenCache {
    fn clone(&self) -> Self {
        Self(Mutex::new(
            self.0.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        ))
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.fmt(f)
    }
}

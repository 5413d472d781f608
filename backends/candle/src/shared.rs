//! Core's layer, shared by a layer of candle and its heads.

use std::sync::Arc;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use trainable_tokens_core::TrainableTokens as CoreLayer;

use crate::Candle;

/// A handle on core's layer. Only [`TrainableTokens`](crate::TrainableTokens) changes it, which nobody can clone, while
/// heads read.
///
/// A reader may read again: what could wait in between for a change holds the layer exclusively, and so does not exist
/// while a guard borrows from it.
#[derive(Clone, Debug)]
pub(crate) struct Shared(Arc<RwLock<CoreLayer<Candle>>>);

impl Shared {
    pub(crate) fn new(layer: CoreLayer<Candle>) -> Self {
        Self(Arc::new(RwLock::new(layer)))
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, CoreLayer<Candle>> {
        self.0.read()
    }

    pub(crate) fn write(&mut self) -> RwLockWriteGuard<'_, CoreLayer<Candle>> {
        self.0.write()
    }
}

//! Keys and values of the positions that a model has seen.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache;

use super::Decoder;
use crate::Result;

/// Room that a cache gets at a time, in positions.
const ROOM: usize = 256;

/// The keys and values of all layers, for the positions of a text so far: to append to a text costs only the new tokens.
/// Keys are kept as they were before rotation.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    layers: Vec<KvCache>,
    length: usize,
}

impl KeyValueCache {
    /// How many positions it holds.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Decoder {
    /// A cache that holds no position yet.
    pub fn new_cache(&self) -> KeyValueCache {
        KeyValueCache {
            layers: vec![KvCache::new(1, ROOM); self.layers.len()],
            length: 0,
        }
    }

    /// The last hidden states, normed, of `embeddings` `[B, L, D]` that follow the positions in the cache: `[B, L, D]`. As
    /// [`hidden`](Self::hidden) of the whole text, without a graph, but for rotary embeddings that depend on its length (dynamic
    /// and `LongRope`): what the cache holds was rotated for a shorter one. The batch must be as large as at the cache's first use.
    ///
    /// # Errors
    ///
    /// Those of [`hidden`](Self::hidden); afterwards the cache is of no use.
    pub fn hidden_after(&self, cache: &mut KeyValueCache, embeddings: &Tensor) -> Result<Tensor> {
        let (_, length, _) = embeddings.dims3()?;
        self.expect_length(cache.length + length)?;
        let (mut hidden, rotations) = self.positioned(&embeddings.detach(), cache.length)?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            hidden = layer.forward(&hidden, &rotations, Some(cache))?;
        }
        cache.length += length;
        Ok(self.norm.forward(&hidden)?)
    }
}

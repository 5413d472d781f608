//! Linear layers, with or without weights of LoRA beside the frozen one.

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use trainable_tokens_candle::{CandleDelta, FrozenLinear};
use trainable_tokens_core::{DeltaStore, TokenRows};
use trainable_tokens_format::LoraWeights;

use crate::Result;
use crate::ops::working_dtype;

/// LoRA's weights of one linear layer: `scaling · B·A` is added to its weight (Hu et al. 2021). Both factors train.
///
/// Clones share the factors.
#[derive(Clone, Debug)]
pub struct LowRank {
    path: String,
    scaling: f64,
    a: CandleDelta,
    b: CandleDelta,
}

/// `x·Wᵀ + bias`, all frozen, plus the low-rank product where there is one.
#[derive(Debug)]
pub(crate) struct Linear {
    frozen: FrozenLinear,
    low_rank: Option<LowRank>,
}

impl LowRank {
    /// Puts the factors of the layer at `path` on a device, in at least single precision.
    pub(super) fn new(weights: &LoraWeights, path: &str, device: &Device) -> Result<Self> {
        let [a, b] = weights.factors()?;
        let factor =
            |rows: &TokenRows| CandleDelta::new(&rows.to_dtype(rows.dtype().default_row_dtype()), device);
        Ok(Self {
            path: path.to_owned(),
            scaling: weights.scaling(),
            a: factor(&a)?,
            b: factor(&b)?,
        })
    }

    /// The path of the layer in the model.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What the product is multiplied by.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The factors `A` `[r, in]` and `B` `[out, r]`.
    pub fn factors(&self) -> [&CandleDelta; 2] {
        [&self.a, &self.b]
    }

    /// How many elements the factors have.
    pub fn num_parameters(&self) -> usize {
        let size = |factor: &CandleDelta| factor.num_rows() * factor.embedding_dim();
        size(&self.a) + size(&self.b)
    }

    /// The factors `A` `[r, in]` and `B` `[out, r]` on the host.
    ///
    /// # Errors
    ///
    /// Candle's errors.
    pub fn read(&self) -> Result<[TokenRows; 2]> {
        Ok([self.a.read()?, self.b.read()?])
    }

    /// `scaling · x·Aᵀ·Bᵀ` for `x` `[.., in]`, in at least single precision, as PEFT computes it.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let width = x.dims().last().copied().unwrap_or(0);
        let leading = &x.dims()[..x.rank().saturating_sub(1)];
        // A pass whose input has no graph makes none here either.
        let factor = |factor: &CandleDelta, dtype: DType| {
            let tensor = factor.tensor();
            let tensor = if x.track_op() {
                tensor.clone()
            } else {
                tensor.detach()
            };
            tensor.to_dtype(dtype)?.t()
        };
        let dtype = working_dtype(x.dtype());
        let rows = x.to_dtype(dtype)?.reshape(((), width))?;
        let sums = rows
            .matmul(&factor(&self.a, dtype)?)?
            .matmul(&factor(&self.b, dtype)?)?;
        let outputs = self.b.num_rows();
        (sums.reshape([leading, &[outputs]].concat())? * self.scaling)?.contiguous()
    }
}

impl Linear {
    pub(super) fn new(frozen: FrozenLinear, low_rank: Option<LowRank>) -> Self {
        Self { frozen, low_rank }
    }

    /// The frozen layer, if it is all there is.
    pub(super) fn frozen(&self) -> Option<&FrozenLinear> {
        match self.low_rank {
            None => Some(&self.frozen),
            Some(_) => None,
        }
    }

    /// The leaves of the graph in it: LoRA's factors.
    pub(super) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        let factors = self.low_rank.iter().flat_map(LowRank::factors);
        factors.map(CandleDelta::tensor)
    }
}

impl Module for Linear {
    /// `[.., in]` to `[.., out]`, in the type of `x`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let frozen = self.frozen.forward(x)?;
        let Some(low_rank) = &self.low_rank else {
            return Ok(frozen);
        };
        let added = low_rank.forward(x)?;
        (frozen.to_dtype(added.dtype())? + added)?.to_dtype(frozen.dtype())
    }
}

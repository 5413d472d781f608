//! Weights of a checkpoint as tensors on a device.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use trainable_tokens_candle::FrozenLinear;
use trainable_tokens_core::{Element, EmbeddingSource, RowRef};
use trainable_tokens_format::{Checkpoint, ExtendedTable, TensorRef};

use super::linear::{Linear, LowRank};
use crate::config::WeightLayout;
use crate::{Error, Result};

/// Loads tensors by name, checks their shapes, converts them in one pass.
pub(super) struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: DType,
    device: &'a Device,
    num_parameters: Cell<usize>,
    /// LoRA's weights that no layer has taken yet, by the path of theirs.
    waiting: RefCell<BTreeMap<String, LowRank>>,
    /// Those that layers have taken.
    taken: RefCell<Vec<LowRank>>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, dtype: DType, device: &'a Device) -> Self {
        Self {
            checkpoint,
            dtype,
            device,
            num_parameters: Cell::new(0),
            waiting: RefCell::default(),
            taken: RefCell::default(),
        }
    }

    /// Gives the linear layers at their paths weights of LoRA.
    pub(super) fn with_low_rank(self, weights: impl IntoIterator<Item = LowRank>) -> Self {
        let by_path = weights
            .into_iter()
            .map(|low_rank| (low_rank.path().to_owned(), low_rank));
        self.waiting.borrow_mut().extend(by_path);
        self
    }

    /// LoRA's weights of the layers loaded so far.
    pub(super) fn low_rank(&self) -> Vec<LowRank> {
        self.taken.borrow().clone()
    }

    /// Refuses weights of LoRA for a layer that the model does not have.
    pub(super) fn expect_all_taken(&self) -> Result<()> {
        match self.waiting.borrow().keys().next() {
            None => Ok(()),
            Some(path) => Err(Error::Setting(format!(
                "module {path} has weights of LoRA, but it is no linear layer of the model; `merge` applies them"
            ))),
        }
    }

    /// Parameters loaded so far.
    pub(super) fn num_parameters(&self) -> usize {
        self.num_parameters.get()
    }

    /// Whether the checkpoint has a tensor.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }

    /// A tensor that must have `shape`.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.expect_shape(name, shape)?;
        let bytes = RowRef::Bytes(tensor.float_dtype()?, tensor.bytes);
        self.num_parameters.set(self.num_parameters.get() + bytes.len());
        match self.dtype {
            DType::F64 => self.upload::<f64>(bytes, shape),
            DType::F32 => self.upload::<f32>(bytes, shape),
            DType::F16 => self.upload::<f16>(bytes, shape),
            DType::BF16 => self.upload::<bf16>(bytes, shape),
            other => Err(Error::Setting(format!("weights cannot be loaded as {other:?}"))),
        }
    }

    /// Refuses a tensor that does not have the shape that follows from the config.
    pub(super) fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<TensorRef<'a>> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            return Err(Error::Config {
                path: self.checkpoint.config_path(),
                reason: format!(
                    "says that tensor {name} has shape {shape:?}, but in {} it has {:?}",
                    tensor.file.display(),
                    tensor.shape
                ),
            });
        }
        Ok(tensor)
    }

    /// Refuses a checkpoint without the output layer that its config asks for: transformers would start it at random.
    pub(super) fn expect_untied_head(&self, module: &str) -> Result<()> {
        let name = format!("{module}.weight");
        if self.contains(&name) {
            return Ok(());
        }
        Err(Error::Config {
            path: self.checkpoint.config_path(),
            reason: format!(
                "says that the output layer has a table of its own, but the checkpoint has no tensor {name}: it is that of a \
                 base model alone, and predicts no tokens"
            ),
        })
    }

    /// A table of a checkpoint, with the rows of new tokens after its last.
    pub(super) fn table(&self, table: &ExtendedTable) -> Result<Tensor> {
        fn rows<T: Element + WithDType>(table: &ExtendedTable, device: &Device) -> Result<Tensor> {
            let (base, added) = (table.base(), table.added());
            let shape = (table.vocab_size(), table.embedding_dim());
            let mut values = vec![T::default(); shape.0 * shape.1];
            let (old, new) = values.split_at_mut(base.vocab_size() * shape.1);
            RowRef::Bytes(base.dtype(), base.bytes()).decode_into(old);
            for (row, out) in new.chunks_exact_mut(shape.1.max(1)).enumerate() {
                if let Some(row) = added.row(row) {
                    row.decode_into(out);
                }
            }
            Ok(Tensor::from_vec(values, shape, device)?)
        }
        let elements = table.vocab_size() * table.embedding_dim();
        self.num_parameters.set(self.num_parameters.get() + elements);
        match self.dtype {
            DType::F64 => rows::<f64>(table, self.device),
            DType::F32 => rows::<f32>(table, self.device),
            DType::F16 => rows::<f16>(table, self.device),
            DType::BF16 => rows::<bf16>(table, self.device),
            other => Err(Error::Setting(format!("weights cannot be loaded as {other:?}"))),
        }
    }

    fn upload<T: Element + WithDType>(&self, bytes: RowRef<'_>, shape: &[usize]) -> Result<Tensor> {
        let mut values = vec![T::default(); bytes.len()];
        bytes.decode_into(&mut values);
        Ok(Tensor::from_vec(values, shape, self.device)?)
    }

    /// A linear layer, with its bias where the model has one, and with its weights of LoRA.
    pub(super) fn linear(
        &self,
        module: &str,
        [out, input]: [usize; 2],
        bias: bool,
        layout: WeightLayout,
    ) -> Result<Linear> {
        let name = format!("{module}.weight");
        let weight = match layout {
            WeightLayout::OutIn => self.tensor(&name, &[out, input])?,
            WeightLayout::InOut => self.tensor(&name, &[input, out])?.t()?.contiguous()?,
        };
        let bias = if bias {
            Some(self.tensor(&format!("{module}.bias"), &[out])?)
        } else {
            None
        };
        Ok(self.with_low_rank_of(module, FrozenLinear::new(weight, bias)?))
    }

    /// A linear layer with its weights of LoRA, if there are any.
    pub(super) fn with_low_rank_of(&self, module: &str, frozen: FrozenLinear) -> Linear {
        let low_rank = self.waiting.borrow_mut().remove(module);
        self.taken.borrow_mut().extend(low_rank.clone());
        Linear::new(frozen, low_rank)
    }
}

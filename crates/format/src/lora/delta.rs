//! What LoRA's weights add to a tensor of a checkpoint.

use std::ops::Range;

use trainable_tokens_core::{Element, EmbeddingSource as _, ErrorKind, RowRef};

use super::layout::{Layout, Layouts, of_shape};
use super::target::LoraTargets;
use super::{LoraLayer, LoraWeights, StoredFactor};
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::config::{PeftType, is_path_or_suffix};
use crate::error::{Error, Result};
use crate::model::ModelTables;
use crate::table::ExtendedTable;

/// Modules that checkpoints of BERT also hold for models of classes that do not have them: only the file tells whether they
/// have weights.
const OPTIONAL: [&str; 2] = ["pooler.dense", "cls.seq_relationship"];

/// LoRA's weights of one module, matched with the tensor of a checkpoint that they are added to.
#[derive(Clone, Debug)]
pub struct LoraDelta {
    weights: LoraWeights,
    tensor: String,
    layout: Layout,
}

impl LoraDelta {
    /// The name by which the tensor is stored, such as `model.layers.0.self_attn.q_proj.weight`.
    pub fn tensor(&self) -> &str {
        &self.tensor
    }

    /// The weights.
    pub fn weights(&self) -> &LoraWeights {
        &self.weights
    }

    /// The weight that is in the file of the adapter, in the place of the base's.
    pub(crate) fn base_table(&self) -> Result<Option<ExtendedTable>> {
        let stored = self.weights.base.as_ref();
        let table = stored.map(|stored| stored.file.table(&stored.name)).transpose()?;
        Ok(table.map(ExtendedTable::from))
    }
}

impl Adapter {
    /// What merging the adapter into `base` adds to its tensors: one for each module with LoRA's weights.
    ///
    /// # Errors
    ///
    /// Those of [`lora_weights`](Self::lora_weights); [`Error::Base`] if a module has no weight there or one of another
    /// shape; [`Error::TensorMissing`] if a weight there is targeted, but the file has no factors for it (PEFT only warns; a
    /// pooler of BERT may have none), or if a module there is saved whole, but not in the file; [`Error::Unsupported`] if a
    /// module also has rows of tokens (so does PEFT refuse it); those of [`Checkpoint::table`].
    pub fn lora_deltas(&self, base: &Checkpoint) -> Result<Vec<LoraDelta>> {
        let base = &base.named_for(self)?;
        let weights = self.lora_weights()?;
        if self.config().peft_type() == PeftType::Lora {
            self.check_complete(base, &weights)?;
        }
        let (layouts, model) = (Layouts::of(base, &weights)?, ModelTables::of(base)?);
        let deltas = weights
            .iter()
            .map(|lora| self.match_with(base, &model, lora, &layouts));
        deltas.collect()
    }

    /// Every module of the base that should have weights has them.
    fn check_complete(&self, base: &Checkpoint, weights: &[LoraWeights]) -> Result<()> {
        let targets = LoraTargets::new(self.config(), self.origin())?;
        let missing = |tensor: String, hint: String| Error::TensorMissing {
            path: self.origin().to_owned(),
            tensor,
            hint,
        };
        if weights.is_empty() && self.modules().is_empty() {
            let hint = ", nor any other of LoRA's, and no rows of tokens".to_owned();
            return Err(missing(super::Factor::LinearA.key("<module>"), hint));
        }
        for stored in base.names() {
            let name = base.module_name(stored);
            let (path, _) = name.rsplit_once('.').unwrap_or_default();
            if targets.save(path)? {
                let hint = format!(", though modules_to_save has the module of {name:?}");
                return Err(missing(format!("base_model.model.{name}"), hint));
            }
            let has_weights = |path: &str| weights.iter().any(|lora| lora.path() == path);
            if targets.are_known()
                && let Some(path) = targets.matrix(base, stored)?
                && !OPTIONAL.iter().any(|end| is_path_or_suffix(end, &path))
                && !has_weights(&path)
            {
                let hint = format!(
                    ", though target_modules targets {path:?}; if the model has no such module, name it in exclude_modules"
                );
                return Err(missing(super::Factor::LinearA.key(&path), hint));
            }
        }
        Ok(())
    }

    fn match_with(
        &self,
        base: &Checkpoint,
        model: &ModelTables,
        lora: &LoraWeights,
        layouts: &Layouts<'_>,
    ) -> Result<LoraDelta> {
        let path = lora.path();
        if self.rows(path).is_some() {
            return Err(Error::Unsupported {
                path: self.origin().to_owned(),
                what: format!(
                    "module {path:?} has both rows of tokens and weights of LoRA; it can have one of them"
                ),
            });
        }
        let tensor = format!("{path}.weight");
        let misfit = |kind, reason| {
            Err(Error::Base {
                path: base.dir().to_owned(),
                kind,
                reason,
            })
        };
        let is_tied = model.tied().iter().any(|tied| tied == path);
        if is_tied || !base.contains(&tensor) {
            let why = if is_tied {
                "its table is that of the embedding, which would change too; untie the model, or leave the head out"
            } else if base.contains(&format!("{path}.qweight")) {
                "its weight is quantised"
            } else {
                "weights of LoRA are added to that"
            };
            let reason = format!(
                "module {path:?} has weights of LoRA, but no tensor {tensor:?} of its own there; {why}"
            );
            return misfit(ErrorKind::File, reason);
        }
        let table = base.table(&tensor)?;
        let tensor = table.name().to_owned();
        let own = [table.vocab_size(), table.embedding_dim()];
        let have = lora.base.as_ref().map_or(own, |stored| stored.shape);
        let grows = model.shares_input_embedding(path) || model.head() == Some(path);
        if own[1] != have[1] || (own[0] != have[0] && !(grows && own[0] < have[0])) {
            let name = lora.base.as_ref().map_or("", |stored| &stored.name);
            let reason = format!("tensor {name:?} is {have:?}, but {tensor} is {own:?}");
            return misfit(ErrorKind::Shape, reason);
        }
        let out_in = [lora.out_features(), lora.in_features()];
        let layout = match lora.layer() {
            LoraLayer::Embedding if have == [out_in[1], out_in[0]] => Some(Layout::InOut),
            LoraLayer::Linear if have == out_in && out_in[0] == out_in[1] => Some(layouts.of_square(lora)),
            LoraLayer::Linear => of_shape(have, out_in),
            LoraLayer::Embedding => None,
        };
        let Some(layout) = layout else {
            let [outputs, inputs] = out_in;
            let wanted = match lora.layer() {
                LoraLayer::Linear => format!("{inputs} inputs and {outputs} outputs"),
                LoraLayer::Embedding => format!("{inputs} rows of {outputs}"),
            };
            let reason = format!("weights of LoRA for {path:?} have {wanted}, but {tensor} is {have:?}");
            return misfit(ErrorKind::Shape, reason);
        };
        Ok(LoraDelta {
            weights: lora.clone(),
            tensor,
            layout,
        })
    }
}

/// A delta for a tensor of `T`: `left @ right`, scaled, all in the compute type.
pub(crate) struct LowRank<'a, T: Element> {
    delta: &'a LoraDelta,
    /// `[r, columns]`.
    right: Vec<T::Compute>,
    scaling: T::Compute,
}

impl<'a, T: Element> LowRank<'a, T> {
    /// Reads the factor that all rows share.
    pub(crate) fn new(delta: &'a LoraDelta) -> Self {
        let LoraWeights { a, b, .. } = &delta.weights;
        let right = match delta.layout {
            Layout::OutIn => a.values(0..a.shape[0]),
            Layout::InOut => b.columns(0..b.shape[1]),
        };
        Self {
            delta,
            right,
            scaling: Element::from_f64(delta.weights.scaling),
        }
    }

    /// Adds the delta's `rows` to those of the tensor, each sum rounded to its type. As in PEFT, what is added to a linear
    /// weight is rounded with the sum alone, what is added to an embedding also before.
    pub(crate) fn add_to(&self, rows: Range<usize>, values: &mut [T]) {
        let LoraWeights {
            a, b, rank, layer, ..
        } = &self.delta.weights;
        let left: Vec<T::Compute> = match self.delta.layout {
            Layout::OutIn => b.values(rows),
            Layout::InOut => a.columns(rows),
        };
        let columns = (self.right.len() / rank).max(1);
        let mut sums = vec![T::Compute::default(); columns];
        for (left, values) in left.chunks_exact(*rank).zip(values.chunks_exact_mut(columns)) {
            sums.fill(T::Compute::default());
            for (factor, right) in left.iter().zip(self.right.chunks_exact(columns)) {
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum += *factor * *right;
                }
            }
            for (value, sum) in values.iter_mut().zip(&sums) {
                let add = *sum * self.scaling;
                let add = match layer {
                    LoraLayer::Linear => add,
                    LoraLayer::Embedding => T::from_compute(add).to_compute(),
                };
                *value = T::from_compute(value.to_compute() + add);
            }
        }
    }
}

impl StoredFactor {
    /// Rows of the matrix, row-major.
    fn values<C: Element>(&self, rows: Range<usize>) -> Vec<C> {
        self.decode(rows.start * self.shape[1]..rows.end * self.shape[1])
    }

    /// Columns of the matrix as the rows of its transpose, row-major.
    fn columns<C: Element>(&self, columns: Range<usize>) -> Vec<C> {
        let [height, width] = self.shape;
        let mut out = vec![C::default(); height * columns.len()];
        for row in 0..height {
            let values: Vec<C> = self.decode(row * width + columns.start..row * width + columns.end);
            let places = out.iter_mut().skip(row).step_by(height);
            places.zip(values).for_each(|(place, value)| *place = value);
        }
        out
    }

    fn decode<C: Element>(&self, elements: Range<usize>) -> Vec<C> {
        let size = self.dtype.size_in_bytes();
        let bytes = self.bytes().get(elements.start * size..elements.end * size);
        let mut out = vec![C::default(); elements.len()];
        RowRef::Bytes(self.dtype, bytes.unwrap_or_default()).decode_into(&mut out);
        out
    }

    /// The first value that is not finite, as (row, column); read row by row.
    pub(super) fn first_non_finite(&self) -> Option<(usize, usize)> {
        (0..self.shape[0]).find_map(|row| {
            let values: Vec<f64> = self.values(row..row + 1);
            values
                .iter()
                .position(|value| !value.is_finite())
                .map(|column| (row, column))
        })
    }
}

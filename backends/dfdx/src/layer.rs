//! The embedding layer, at sizes known at runtime.

mod forward;

use std::ops::{Deref, DerefMut};

use dfdx::nn::modules::Embedding;
use dfdx::shapes::{Rank2, RealizeShapeTo, Shape};
use dfdx::tensor::{Cpu, Gradients, Tape, Tensor};
use dfdx::tensor_ops::RealizeTo;
use trainable_tokens_core::{
    DeltaStore, EmbeddingSource, Error as CoreError, HostTable, LayerOptions, LookupPlan, OptimizerHook,
    RowOptimizer, StepReport, TokenAdapter, TokenRows, TokenSet, TrainableTokens as CoreLayer,
};

use crate::convert::{at_runtime, dims, to_rows};
use crate::ops::Lookup;
use crate::{Dfdx, DfdxDelta, DfdxDevice, DfdxElement, DfdxTable, Error, Result, TiedHead};

/// An embedding of which only chosen rows train: takes the place of a [`dfdx::nn::modules::Embedding`].
///
/// ```
/// # use dfdx::prelude::*;
/// # use trainable_tokens_dfdx::TrainableTokens;
/// # fn main() -> Result<(), trainable_tokens_dfdx::Error> {
/// # let dev = Cpu::default();
/// let embed = dev.build_module::<Embedding<32, 4>, f32>();
/// # let plain = embed.clone();
/// let embed = TrainableTokens::wrap(embed, &[5, 7])?;
/// # let ids = dev.tensor([1, 5, 7, 7]);
/// # assert_eq!(embed.forward(ids.clone()).as_vec(), plain.forward(ids).as_vec());
/// # Ok(())
/// # }
/// ```
///
/// Ids are a tensor of `usize`, with the tape if there is one, as for dfdx's own embedding ([`Module`](dfdx::nn::Module)), or a slice
/// of `u32` ([`lookup`](Self::lookup)). They are checked: dfdx's own embedding panics.
///
/// The table is frozen: it is in no graph, and no `V x D` tensor is made by a step. Train with
/// [`step`](Self::step) and an optimizer of `trainable-tokens-core`, which work at any size and keep rows of `f32`
/// over a table of `f16`, or with one of dfdx's through [`change_rows`](Self::change_rows).
///
/// # Adapters
///
/// This is core's [layer](CoreLayer) in dfdx's habit and has all its functions: rows, gradients and steps, adapters by
/// name, and merges. A pair of ids `[B, N]` and `B` names is a mixed batch:
///
/// ```
/// # use dfdx::prelude::*;
/// # use trainable_tokens_core::TokenSet;
/// # use trainable_tokens_dfdx::TrainableTokens;
/// # fn main() -> Result<(), trainable_tokens_dfdx::Error> {
/// # let dev = Cpu::default();
/// # let embed = dev.build_module::<Embedding<32, 4>, f32>();
/// let mut embed = TrainableTokens::wrap(embed, &[5, 7])?;
/// embed.add_adapter("french", TokenSet::new([8], 32)?)?;
/// embed.activate(&["default", "french"])?;
///
/// let ids = dev.tensor([[1, 5, 8], [1, 5, 8]]);
/// let both = embed.try_forward(ids.clone())?; // every example sees the rows of both
/// let each = embed.try_forward((ids, &[Some("french"), None][..]))?;
/// # assert_eq!(both.as_vec(), each.as_vec());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TrainableTokens<E: DfdxElement, D: DfdxDevice<E> = Cpu> {
    layer: CoreLayer<Dfdx<E, D>>,
}

impl<E: DfdxElement, D: DfdxDevice<E>> TrainableTokens<E, D> {
    /// Trains the rows `token_ids` of an embedding, from where they are. The order of the ids is that of the rows.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and when dfdx fails.
    pub fn wrap<const V: usize, const M: usize>(
        embedding: Embedding<V, M, E, D>,
        token_ids: &[u32],
    ) -> Result<Self> {
        Self::from_tensor(embedding.weight, token_ids)
    }

    /// Trains the rows `token_ids` of a table `[V, D]`, from where they are.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and when dfdx fails.
    pub fn from_tensor<S>(table: Tensor<S, E, D>, token_ids: &[u32]) -> Result<Self>
    where
        S: Shape<Concrete = [usize; 2]> + RealizeShapeTo<(usize, usize)>,
    {
        Self::from_table(DfdxTable::new(table)?, token_ids)
    }

    /// Trains the rows `token_ids` of a table in host memory or a memory-mapped file, which is copied to `device`.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and those of [`DfdxTable::load`].
    pub fn load<S: HostTable>(table: &S, token_ids: &[u32], device: &D) -> Result<Self> {
        Self::from_table(DfdxTable::load(table, device)?, token_ids)
    }

    fn from_table(table: DfdxTable<E, D>, token_ids: &[u32]) -> Result<Self> {
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        let layer = CoreLayer::new(table, tokens)?;
        Ok(Self { layer })
    }

    /// Trains the rows `token_ids` of a table `[V, D]`, from given rows `[k, D]` and in their element type.
    ///
    /// # Errors
    ///
    /// Those of [`from_tensor`](Self::from_tensor), and for rows of another shape.
    pub fn with_rows<S>(table: Tensor<S, E, D>, token_ids: &[u32], rows: &TokenRows) -> Result<Self>
    where
        S: Shape<Concrete = [usize; 2]> + RealizeShapeTo<(usize, usize)>,
    {
        let table = DfdxTable::new(table)?;
        let tokens = TokenSet::new(token_ids.iter().copied(), table.vocab_size())?;
        let layer = CoreLayer::with_rows(table, tokens, rows)?;
        Ok(Self { layer })
    }

    /// Sets the padding token and what becomes of looked-up rows.
    #[must_use]
    pub fn with_options(self, options: LayerOptions) -> Self {
        self.layer.with_options(options).into()
    }

    /// The rows `[N, D]` of a batch, as a node of `tape`: `OwnedTape::default()` for a tape of its own, one with the
    /// gradients of [`alloc_grads`](Self::alloc_grads), or `NoneTape` for inference.
    ///
    /// # Errors
    ///
    /// For an id out of range, and when dfdx fails.
    pub fn lookup<T: Tape<E, D>>(
        &self,
        input_ids: &[u32],
        tape: T,
    ) -> Result<Tensor<(usize, usize), E, D, T>> {
        self.lookup_planned(&self.layer.plan(input_ids)?, tape)
    }

    /// As [`lookup`](Self::lookup), for a batch of `adapters.len()` equally long examples, each of which sees the rows of
    /// the adapter of its name, or the base's alone. The adapters need not be active.
    ///
    /// # Errors
    ///
    /// Those of [`lookup`](Self::lookup) and of core's [`lookup_mixed`](CoreLayer::lookup_mixed).
    pub fn lookup_mixed<T: Tape<E, D>>(
        &self,
        input_ids: &[u32],
        adapters: &[Option<&str>],
        tape: T,
    ) -> Result<Tensor<(usize, usize), E, D, T>> {
        self.lookup_planned(&self.layer.plan_mixed(input_ids, adapters)?, tape)
    }

    /// The rows `[N, D]` of a planned batch, as a node of `tape`.
    ///
    /// # Errors
    ///
    /// Those of core's [`lookup_planned`](CoreLayer::lookup_planned).
    pub fn lookup_planned<T: Tape<E, D>>(
        &self,
        plan: &LookupPlan,
        tape: T,
    ) -> Result<Tensor<(usize, usize), E, D, T>> {
        let rows = self.layer.rows_for(plan)?;
        let lookup = Lookup {
            base: self.layer.source().tensor(),
            rows: rows.as_deref().map(DfdxDelta::new_rows),
            plan,
            transform: self.layer.transform(),
        };
        lookup.forward(tape)
    }

    /// A head that shares this layer's table and rows; see there.
    pub fn tied_head(&self) -> TiedHead<'_, E, D> {
        TiedHead::new(&self.layer)
    }

    /// The frozen table.
    pub fn table(&self) -> &DfdxTable<E, D> {
        self.layer.source()
    }

    /// Gradients for a tape, in which those of all adapters' rows outlive a backward pass and all others do not: dfdx's
    /// `ZeroGrads::alloc_grads`.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn alloc_grads(&self) -> Result<Gradients<E, D>> {
        let mut gradients = Gradients::leaky();
        self.zero_grads(&mut gradients)?;
        Ok(gradients)
    }

    /// Zeroes the gradients of all adapters' rows and lets them outlive backward passes: dfdx's `ZeroGrads::zero_grads`.
    /// Call it also on the `alloc_grads()` of a module that trains together with them.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn zero_grads(&self, gradients: &mut Gradients<E, D>) -> Result<()> {
        let mut adapters = self.layer.adapters();
        adapters.try_for_each(|adapter| adapter.delta().zero_grads(gradients))
    }

    /// Lets `change` write the rows of the one active adapter as a tensor of dfdx, as its optimizers do:
    /// `embed.change_rows::<K, M, _>(|rows| adam.update(rows, &gradients))`. The sizes must be known at compile time,
    /// like those of all tensors that these optimizers take.
    ///
    /// # Errors
    ///
    /// [`CoreError::NotOneActive`]; those of [`change_rows_of`](Self::change_rows_of).
    pub fn change_rows<const K: usize, const M: usize, R>(
        &mut self,
        change: impl FnOnce(&mut Tensor<Rank2<K, M>, E, D>) -> R,
    ) -> Result<R> {
        change_adapter(self.layer.active_adapter_mut()?, change)
    }

    /// As [`change_rows`](Self::change_rows), for the rows of the adapter `name`, active or not.
    ///
    /// # Errors
    ///
    /// [`CoreError::UnknownAdapter`]; for rows of another shape; while merged; [`Error::Unsupported`] if the rows train
    /// in another element type than the table's, because dfdx's gradients have the table's. Nothing is changed then.
    pub fn change_rows_of<const K: usize, const M: usize, R>(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut Tensor<Rank2<K, M>, E, D>) -> R,
    ) -> Result<R> {
        change_adapter(self.layer.adapter_mut(name)?, change)
    }

    /// One optimizer step on the rows of the one active adapter, with hooks before and after.
    ///
    /// # Errors
    ///
    /// Those of core's [`step`](CoreLayer::step). [`CoreError::NoGradient`] also if the tape was made to drop the gradients
    /// of all but other leaves, see [`zero_grads`](Self::zero_grads).
    pub fn step(
        &mut self,
        gradients: &Gradients<E, D>,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.layer.step(gradients, optimizer, hooks)
    }

    /// Gives up dfdx's habit for core's layer.
    pub fn into_layer(self) -> CoreLayer<Dfdx<E, D>> {
        self.layer
    }

    /// Gives the table back as it is now (merged or not).
    pub fn into_table(self) -> DfdxTable<E, D> {
        self.layer.into_source()
    }

    /// Gives the table back as dfdx's own embedding, as it is now (merged or not).
    ///
    /// # Errors
    ///
    /// If the table is not `[V, M]`.
    pub fn into_embedding<const V: usize, const M: usize>(self) -> Result<Embedding<V, M, E, D>> {
        let table = self.into_table().into_tensor();
        let got = dims(&table);
        match table.try_realize::<Rank2<V, M>>() {
            Ok(weight) => Ok(Embedding { weight }),
            Err(_) => Err(CoreError::shape("embedding table", &[V, M], &got).into()),
        }
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> From<CoreLayer<Dfdx<E, D>>> for TrainableTokens<E, D> {
    fn from(layer: CoreLayer<Dfdx<E, D>>) -> Self {
        Self { layer }
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> Deref for TrainableTokens<E, D> {
    type Target = CoreLayer<Dfdx<E, D>>;

    fn deref(&self) -> &Self::Target {
        &self.layer
    }
}

impl<E: DfdxElement, D: DfdxDevice<E>> DerefMut for TrainableTokens<E, D> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.layer
    }
}

fn change_adapter<E: DfdxElement, D: DfdxDevice<E>, const K: usize, const M: usize, R>(
    adapter: &mut TokenAdapter<Dfdx<E, D>>,
    change: impl FnOnce(&mut Tensor<Rank2<K, M>, E, D>) -> R,
) -> Result<R> {
    if adapter.is_merged() {
        let adapter = adapter.name().to_owned();
        return Err(CoreError::AlreadyMerged { adapter }.into());
    }
    if adapter.delta().dtype() != E::DTYPE {
        return Err(Error::Unsupported {
            what: "training rows as a tensor of dfdx",
            why: "they train in another element type than the table's",
        });
    }
    let mut rows = adapter.delta().to_const()?;
    let result = change(&mut rows);
    adapter.set_rows(&to_rows(&at_runtime(rows)?)?)?;
    Ok(result)
}

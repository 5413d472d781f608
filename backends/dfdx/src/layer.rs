//! The embedding layer, at sizes known at runtime.

use dfdx::nn::modules::Embedding;
use dfdx::nn::{Module, NonMutableModule};
use dfdx::shapes::{Dim, HasShape, Rank2, RealizeShapeTo, Shape};
use dfdx::tensor::{Cpu, Gradients, SplitTape, Tape, Tensor};
use dfdx::tensor_ops::{RealizeTo, ReshapeTo};
use trainable_tokens_core::{
    DeltaStore, EmbeddingSource, Error as CoreError, HostTable, LayerOptions, OptimizerHook, RowOptimizer,
    StepReport, TokenRows, TokenSet, TrainableTokens as CoreLayer,
};

use crate::convert::{at_runtime, dims, ids_of, to_rows};
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
/// Ids are a tensor of `usize`, with the tape if there is one, as for dfdx's own embedding ([`Module`]), or a slice
/// of `u32` ([`lookup`](Self::lookup)). They are checked: dfdx's own embedding panics.
///
/// The table is frozen: it is in no graph, and no `V x D` tensor is made by a step. Train with
/// [`step`](Self::step) and an optimizer of `trainable-tokens-core`, which work at any size and keep rows of `f32` over
/// a table of `f16`, or with one of dfdx's through [`change_rows`](Self::change_rows).
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
        let layer = self.layer.with_options(options);
        Self { layer }
    }

    /// The rows `[N, D]` of a batch, as a node of `tape`: `OwnedTape::default()` for a tape of its own, one with the
    /// gradients of [`alloc_grads`](DfdxDelta::alloc_grads), or `NoneTape` for inference.
    ///
    /// # Errors
    ///
    /// For an id out of range, and when dfdx fails.
    pub fn lookup<T: Tape<E, D>>(
        &self,
        input_ids: &[u32],
        tape: T,
    ) -> Result<Tensor<(usize, usize), E, D, T>> {
        let layer = &self.layer;
        let lookup = Lookup {
            base: layer.source().tensor(),
            leaf: layer.active().map(DfdxDelta::as_leaf),
            plan: &layer.plan(input_ids)?,
            transform: layer.transform(),
        };
        lookup.forward(tape)
    }

    /// A head that shares this layer's table and rows; see there.
    pub fn tied_head(&self) -> TiedHead<'_, E, D> {
        TiedHead::new(&self.layer)
    }

    /// Core's layer, for code that is generic over backends.
    pub fn layer(&self) -> &CoreLayer<Dfdx<E, D>> {
        &self.layer
    }

    /// The frozen table.
    pub fn table(&self) -> &DfdxTable<E, D> {
        self.layer.source()
    }

    /// The trainable tokens, in slot order.
    pub fn tokens(&self) -> &TokenSet {
        self.layer.tokens()
    }

    /// The trained rows in dfdx's graph.
    pub fn delta(&self) -> &DfdxDelta<E, D> {
        self.layer.delta()
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.layer.rows()
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape, or while merged.
    pub fn set_rows(&mut self, rows: &TokenRows) -> Result<()> {
        self.layer.set_rows(rows)
    }

    /// Lets `change` write the trained rows as a tensor of dfdx, as its optimizers do:
    /// `embed.change_rows::<K, M, _>(|rows| adam.update(rows, &gradients))`. The sizes must be known at compile time,
    /// like those of all tensors that these optimizers take.
    ///
    /// # Errors
    ///
    /// For rows of another shape; while merged; [`Error::Unsupported`] if the rows train in another element type than
    /// the table's, because dfdx's gradients have the table's. Nothing is changed then.
    pub fn change_rows<const K: usize, const M: usize, R>(
        &mut self,
        change: impl FnOnce(&mut Tensor<Rank2<K, M>, E, D>) -> R,
    ) -> Result<R> {
        if self.is_merged() {
            return Err(CoreError::AlreadyMerged.into());
        }
        if self.delta().dtype() != E::DTYPE {
            return Err(Error::Unsupported {
                what: "training rows as a tensor of dfdx",
                why: "they train in another element type than the table's",
            });
        }
        let mut rows = self.delta().to_const()?;
        let result = change(&mut rows);
        self.set_rows(&to_rows(&at_runtime(rows)?)?)?;
        Ok(result)
    }

    /// The gradient of the trained rows, `[k, D]`, in the type that sums run in: at least `f32`.
    ///
    /// # Errors
    ///
    /// [`trainable_tokens_core::Error::NoGradient`] if the backward pass did not reach the rows: the loss does not
    /// depend on them, the layer is merged, or the tape was made to drop the gradients of all but other leaves (see
    /// [`zero_grads`](DfdxDelta::zero_grads)).
    pub fn gradient(&self, gradients: &Gradients<E, D>) -> Result<TokenRows> {
        self.layer.gradient(gradients)
    }

    /// One optimizer step on the rows, with hooks before and after.
    ///
    /// # Errors
    ///
    /// As [`gradient`](Self::gradient); while merged; those of the optimizer and the hooks.
    pub fn step(
        &mut self,
        gradients: &Gradients<E, D>,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.layer.step(gradients, optimizer, hooks)
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// For a gradient of another shape; while merged; those of the optimizer and the hooks.
    pub fn step_with(
        &mut self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        self.layer.step_with(gradient, optimizer, hooks)
    }

    /// Writes the rows into the table, rounded to its element type; the old rows are kept for
    /// [`unmerge`](Self::unmerge). From then on this layer and its head use the table alone.
    ///
    /// # Errors
    ///
    /// If it is merged already; on CUDA, see [`DfdxTable`].
    pub fn merge(&mut self) -> Result<()> {
        self.layer.merge()
    }

    /// Restores the exact rows that [`merge`](Self::merge) overwrote.
    ///
    /// # Errors
    ///
    /// If it is not merged.
    pub fn unmerge(&mut self) -> Result<()> {
        self.layer.unmerge()
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        self.layer.is_merged()
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

impl<E: DfdxElement, D: DfdxDevice<E>> NonMutableModule for TrainableTokens<E, D> {}

impl<N: Dim, E, D, T> Module<Tensor<(N,), usize, D, T>> for TrainableTokens<E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(N,), usize, D, T>) -> Result<Self::Output> {
        let (ids, tape) = ids.split_tape();
        let ids_on_host = ids_of(&ids, self.table().vocab_size())?;
        let rows = self.lookup(&ids_on_host, tape)?;
        let shape = (ids.shape().0, dims(&rows)[1]);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

impl<B: Dim, N: Dim, E, D, T> Module<Tensor<(B, N), usize, D, T>> for TrainableTokens<E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, usize), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(B, N), usize, D, T>) -> Result<Self::Output> {
        let (ids, tape) = ids.split_tape();
        let ids_on_host = ids_of(&ids, self.table().vocab_size())?;
        let rows = self.lookup(&ids_on_host, tape)?;
        let shape = (ids.shape().0, ids.shape().1, dims(&rows)[1]);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

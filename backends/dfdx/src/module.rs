//! The embedding as a module of dfdx's, at const sizes.

use dfdx::nn::modules::Embedding;
use dfdx::nn::{Module, ModuleVisitor, NonMutableModule, TensorCollection, TensorOptions};
use dfdx::shapes::{Const, Dim, Dtype, HasShape, Rank2};
use dfdx::tensor::{Cpu, SplitTape, Storage, Tape, Tensor};
use dfdx::tensor_ops::{Device, RealizeTo, ReshapeTo};
use trainable_tokens_core::{Error as CoreError, LayerOptions, LookupPlan, TokenRows, TokenSet};

use crate::convert::{Matrix, at_runtime, ids_of, matrix, to_rows};
use crate::ops::{Head, Lookup, NewRows, project};
use crate::{DfdxDevice, DfdxElement, Error, Result};

/// An embedding `[V, M]` of which `K` rows train, as a collection of tensors: dfdx's optimizers, `alloc_grads`,
/// `num_trainable_params` and saving see the trained rows and, detached, the table.
///
/// ```
/// use dfdx::{optim::Adam, prelude::*};
/// use trainable_tokens_dfdx::TrainableEmbedding;
///
/// # fn main() -> Result<(), trainable_tokens_dfdx::Error> {
/// let dev = Cpu::default();
/// let embed = dev.build_module::<Embedding<32, 4>, f32>();
/// let mut embed = TrainableEmbedding::<32, 2, 4, f32>::wrap(embed, &[5, 7])?;
///
/// let mut adam = Adam::new(&embed, Default::default());
/// let ids = dev.tensor([1, 5, 7, 7]).traced(embed.alloc_grads());
/// let loss = (embed.forward(ids) - 1.0).square().mean();
/// adam.update(&mut embed, &loss.backward()).unwrap();
/// assert_eq!(embed.num_trainable_params(), 2 * 4);
/// # Ok(())
/// # }
/// ```
///
/// The rows have the table's element type, because all tensors of one graph of dfdx do. A batch without any trainable
/// token gives them a zero gradient, so that dfdx's optimizers do not report them as unused.
///
/// It has one adapter, for its fields are the tensors: several by name are [`TrainableTokens`](crate::TrainableTokens)'s.
///
/// What dfdx makes of a collection (`build`, `to_dtype`, `to_device`) holds tensors alone: call
/// [`set_tokens`](Self::set_tokens) and [`with_options`](Self::with_options) on the result. Until then every use is an
/// error that names the token set.
#[derive(Clone, Debug)]
pub struct TrainableEmbedding<const V: usize, const K: usize, const M: usize, E: Dtype, D: Storage<E> = Cpu> {
    /// The frozen table.
    pub weight: Tensor<Rank2<V, M>, E, D>,
    /// The trained rows: the new rows themselves, in slot order.
    pub trainable_tokens_delta: Tensor<Rank2<K, M>, E, D>,
    tokens: Option<TokenSet>,
    options: LayerOptions,
}

impl<const V: usize, const K: usize, const M: usize, E, D> TrainableEmbedding<V, K, M, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
{
    /// Trains the rows `token_ids` of an embedding, from where they are. The order of the ids is that of the rows.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, unless there are `K` ids, and when dfdx fails.
    pub fn wrap(embedding: Embedding<V, M, E, D>, token_ids: &[u32]) -> Result<Self> {
        let weight = embedding.weight;
        let tokens = token_set::<V, K>(token_ids)?;
        let rows = D::read_rows(&at_runtime(weight.clone())?, tokens.ids())?;
        let rows = matrix(weight.device(), rows, K, M)?.try_realize();
        Ok(Self {
            weight,
            trainable_tokens_delta: rows.map_err(|_| CoreError::shape("trained rows", &[K, M], &[]))?,
            tokens: Some(tokens),
            options: LayerOptions::default(),
        })
    }

    /// Says which rows of the table the trained rows replace.
    ///
    /// # Errors
    ///
    /// For an id out of range or given twice, and unless there are `K` ids.
    pub fn set_tokens(&mut self, token_ids: &[u32]) -> Result<()> {
        self.tokens = Some(token_set::<V, K>(token_ids)?);
        Ok(())
    }

    /// Sets the padding token and what becomes of looked-up rows.
    #[must_use]
    pub fn with_options(self, options: LayerOptions) -> Self {
        Self { options, ..self }
    }

    /// The trainable tokens, in slot order.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if dfdx made the collection and nobody said which they are.
    pub fn tokens(&self) -> Result<&TokenSet> {
        self.tokens.as_ref().ok_or(Error::Unsupported {
            what: "using the embedding without its token set",
            why: "dfdx makes collections of tensors alone; call `set_tokens`",
        })
    }

    /// Copies the trained rows to the host, `[K, M]` in slot order.
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn rows(&self) -> Result<TokenRows> {
        to_rows(&at_runtime(self.trainable_tokens_delta.clone())?)
    }

    /// The rows `[N, M]` of a batch, as a node of `tape`.
    ///
    /// # Errors
    ///
    /// For an id out of range, and when dfdx fails.
    pub fn lookup<T: Tape<E, D>>(&self, input_ids: &[u32], tape: T) -> Result<Matrix<E, D, T>> {
        let rows = NewRows::plain(at_runtime(self.trainable_tokens_delta.clone())?);
        let lookup = Lookup {
            base: &at_runtime(self.weight.clone())?,
            rows: (K > 0).then_some(&rows),
            plan: &LookupPlan::new(self.tokens()?, self.options, input_ids)?,
            transform: self.options.transform(E::DTYPE),
        };
        lookup.forward(tape)
    }

    /// The logits `[N, V]` of a head that shares the table; see [`TiedHead`](crate::TiedHead).
    ///
    /// # Errors
    ///
    /// When dfdx fails.
    pub fn logits<N: Dim, T: Tape<E, D>>(
        &self,
        hidden: Tensor<(N, Const<M>), E, D, T>,
    ) -> Result<Tensor<(N, Const<V>), E, D, T>> {
        let num_rows = hidden.shape().0;
        let rows = NewRows::plain(at_runtime(self.trainable_tokens_delta.clone())?);
        let head = Head {
            base: &at_runtime(self.weight.clone())?,
            overrides: (K > 0).then_some((&rows, self.tokens()?.ids())),
            bias: None,
        };
        let logits = project(at_runtime(hidden)?, &head)?;
        logits.try_reshape_like(&(num_rows, Const)).map_err(Error::dfdx)
    }

    /// Writes the rows into the table and gives it back as dfdx's own embedding.
    ///
    /// # Errors
    ///
    /// When dfdx fails; on CUDA, see [`DfdxTable`](crate::DfdxTable).
    pub fn merge(self) -> Result<Embedding<V, M, E, D>> {
        let ids = self.tokens()?.ids().to_vec();
        let rows = self.trainable_tokens_delta.as_vec();
        let mut weight = at_runtime(self.weight)?.try_contiguous().map_err(Error::dfdx)?;
        D::write_rows(&mut weight, &ids, &rows)?;
        match weight.try_realize() {
            Ok(weight) => Ok(Embedding { weight }),
            Err(_) => Err(CoreError::shape("embedding table", &[V, M], &[]).into()),
        }
    }
}

fn token_set<const V: usize, const K: usize>(token_ids: &[u32]) -> Result<TokenSet> {
    if token_ids.len() != K {
        return Err(CoreError::shape("trainable tokens", &[K], &[token_ids.len()]).into());
    }
    Ok(TokenSet::new(token_ids.iter().copied(), V)?)
}

impl<const V: usize, const K: usize, const M: usize, E: Dtype, D: Device<E>> TensorCollection<E, D>
    for TrainableEmbedding<V, K, M, E, D>
{
    type To<E2: Dtype, D2: Device<E2>> = TrainableEmbedding<V, K, M, E2, D2>;

    fn iter_tensors<Visitor: ModuleVisitor<Self, E, D>>(
        visitor: &mut Visitor,
    ) -> Result<Option<Self::To<Visitor::E2, Visitor::D2>>, Visitor::Err> {
        visitor.visit_fields(
            (
                Self::tensor(
                    "weight",
                    |this| &this.weight,
                    |this| &mut this.weight,
                    TensorOptions::detached(|_| Ok(())),
                ),
                Self::tensor(
                    "trainable_tokens_delta",
                    |this| &this.trainable_tokens_delta,
                    |this| &mut this.trainable_tokens_delta,
                    TensorOptions::reset_with(|_| Ok(())),
                ),
            ),
            |(weight, trainable_tokens_delta)| TrainableEmbedding {
                weight,
                trainable_tokens_delta,
                tokens: None,
                options: LayerOptions::default(),
            },
        )
    }
}

impl<const V: usize, const K: usize, const M: usize, E: Dtype, D: Storage<E>> NonMutableModule
    for TrainableEmbedding<V, K, M, E, D>
{
}

impl<const V: usize, const K: usize, const M: usize, N: Dim, E, D, T> Module<Tensor<(N,), usize, D, T>>
    for TrainableEmbedding<V, K, M, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(N, Const<M>), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(N,), usize, D, T>) -> Result<Self::Output> {
        let (ids, tape) = ids.split_tape();
        let rows = self.lookup(&ids_of(&ids, V)?, tape)?;
        let shape = (ids.shape().0, Const);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

impl<const V: usize, const K: usize, const M: usize, B: Dim, N: Dim, E, D, T>
    Module<Tensor<(B, N), usize, D, T>> for TrainableEmbedding<V, K, M, E, D>
where
    E: DfdxElement,
    D: DfdxDevice<E>,
    T: Tape<E, D>,
{
    type Output = Tensor<(B, N, Const<M>), E, D, T>;
    type Error = Error;

    fn try_forward(&self, ids: Tensor<(B, N), usize, D, T>) -> Result<Self::Output> {
        let (ids, tape) = ids.split_tape();
        let rows = self.lookup(&ids_of(&ids, V)?, tape)?;
        let shape = (ids.shape().0, ids.shape().1, Const);
        rows.try_reshape_like(&shape).map_err(Error::dfdx)
    }
}

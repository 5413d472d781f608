//! One adapter of the module: a set of tokens with rows of its own.

use std::ops::Deref;
use std::sync::Arc;

use burn::module::{Module, Param, ParamGroup, ParamId};
use burn::tensor::{Gradients, Int, Tensor};
use trainable_tokens_core::{
    DeltaStore, OptimizerHook, RowOptimizer, StepReport, TokenAdapter as CoreAdapter, TokenRows, TokenSet,
};

use crate::convert::to_indices;
use crate::ids::TokenCache;
use crate::{Burn, BurnDelta, Result, TrainableTokens};

/// An adapter of a [`TrainableTokens`] layer: the rows that train and their tokens, as parameters of burn's.
///
/// The name is configuration and in no record.
#[derive(Module, Debug)]
pub struct TokenAdapter {
    delta: Param<Tensor<2>>,
    ids: Param<Tensor<1, Int>>,
    #[module(skip)]
    name: Arc<str>,
    #[module(skip)]
    tokens: TokenCache,
}

impl TokenAdapter {
    /// Keeps the parameter of the ids that `known`, an adapter of the same name, has.
    pub(crate) fn from_core(adapter: CoreAdapter<Burn>, known: Option<&Self>) -> Result<Self> {
        let name = adapter.name().into();
        let (tokens, delta) = adapter.into_parts();
        let delta = delta.into_param()?;
        let (ids, tokens) = if let Some(known) = known {
            (known.ids.clone(), known.tokens.clone())
        } else {
            let ids = to_indices(&tokens.to_vec(), &delta.base().device());
            let ids = Param::initialized(ParamId::new(), ids);
            let tokens = TokenCache::new(&ids, tokens);
            (ids, tokens)
        };
        Ok(Self {
            delta,
            ids,
            name,
            tokens,
        })
    }

    /// A handle on the same rows, as core takes it.
    pub(crate) fn to_core(&self, vocab_size: usize) -> Result<CoreAdapter<Burn>> {
        let tokens = self.tokens.get(&self.ids, vocab_size)?;
        Ok(CoreAdapter::new(&self.name, tokens, self.store()?)?)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.name
    }

    /// The trained rows as burn's parameter, `[k, D]`.
    pub fn delta(&self) -> &Param<Tensor<2>> {
        &self.delta
    }

    /// The rows and their ids as a group of parameters, for records of what was trained.
    pub fn row_params(&self) -> ParamGroup {
        ParamGroup::from_ids(self.param_ids().to_vec())
    }

    pub(crate) fn param_ids(&self) -> [ParamId; 2] {
        [self.delta.id, self.ids.id]
    }

    /// Copies the trained rows to the host, `[k, D]` in slot order.
    ///
    /// # Errors
    ///
    /// When burn fails.
    pub fn rows(&self) -> Result<TokenRows> {
        self.store()?.read()
    }

    fn store(&self) -> Result<BurnDelta> {
        BurnDelta::from_param(self.delta.clone())
    }
}

/// An adapter of a layer, to be looked at.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRef<'a> {
    layer: &'a TrainableTokens,
    adapter: &'a TokenAdapter,
}

impl<'a> AdapterRef<'a> {
    pub(crate) fn new(layer: &'a TrainableTokens, adapter: &'a TokenAdapter) -> Self {
        Self { layer, adapter }
    }

    /// The trainable tokens, in slot order.
    ///
    /// # Errors
    ///
    /// For tokens of a loaded record that are out of range or given twice.
    pub fn tokens(&self) -> Result<TokenSet> {
        self.adapter
            .tokens
            .get(&self.adapter.ids, self.layer.vocab_size())
    }

    /// Whether the rows are written into the table.
    pub fn is_merged(&self) -> bool {
        self.layer.merges().flatten().any(|name| name == self.name())
    }

    /// The gradient of the trained rows, `[k, D]`; zeros if no token trains.
    ///
    /// # Errors
    ///
    /// [`NoGradient`](trainable_tokens_core::Error::NoGradient) if the backward pass did not reach the rows: a cut graph, an
    /// adapter that no lookup and no head used, or one that is merged.
    pub fn gradient(&self, gradients: &Gradients) -> Result<TokenRows> {
        let adapter = self.adapter.to_core(self.layer.vocab_size())?;
        adapter.gradient(gradients)
    }
}

impl Deref for AdapterRef<'_> {
    type Target = TokenAdapter;

    fn deref(&self) -> &TokenAdapter {
        self.adapter
    }
}

/// An adapter of a layer, to be trained.
#[derive(Debug)]
pub struct AdapterMut<'a> {
    layer: &'a mut TrainableTokens,
    name: Arc<str>,
}

impl<'a> AdapterMut<'a> {
    pub(crate) fn new(layer: &'a mut TrainableTokens, name: Arc<str>) -> Self {
        Self { layer, name }
    }

    /// Replaces the trained rows, converted to their element type.
    ///
    /// # Errors
    ///
    /// For rows of another shape, or while merged.
    pub fn set_rows(self, rows: &TokenRows) -> Result<()> {
        let name = self.name;
        self.layer
            .change(|layer| layer.adapter_mut(&name)?.set_rows(rows))
    }

    /// One optimizer step on the rows, with hooks before and after.
    ///
    /// # Errors
    ///
    /// As [`AdapterRef::gradient`]; while merged; those of the optimizer and the hooks.
    pub fn step(
        self,
        gradients: &Gradients,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let name = self.name;
        self.layer
            .change(|layer| layer.adapter_mut(&name)?.step(gradients, optimizer, hooks))
    }

    /// One optimizer step from a gradient on the host, such as one accumulated over batches.
    ///
    /// # Errors
    ///
    /// For a gradient of another shape; while merged; those of the optimizer and the hooks.
    pub fn step_with(
        self,
        gradient: TokenRows,
        optimizer: &mut dyn RowOptimizer,
        hooks: &mut [&mut dyn OptimizerHook],
    ) -> Result<StepReport> {
        let name = self.name;
        self.layer
            .change(|layer| layer.adapter_mut(&name)?.step_with(gradient, optimizer, hooks))
    }
}

//! Rows that share a learning rate.

use trainable_tokens_core::{
    ClampRowNorm, DecayTowardOriginal, EmbeddingSource, Error as CoreError, MatchRowNorm, OptimizerHook,
    OptimizerState, RowOptimizer, TokenId, TokenRows, TokenSet, mean_row_norm, step_rows,
};

use crate::{Error, NormTarget, Result, TrainOptions};

/// The rows of a matrix by their learning rates, as torch has parameter groups.
pub(super) struct Groups {
    trained: Vec<Group>,
    frozen: Vec<usize>,
    num_rows: usize,
}

/// Rows with one learning rate, their optimizer and its hooks.
struct Group {
    /// The rows, ascending.
    slots: Vec<usize>,
    /// What hooks see as the tokens of the rows.
    tokens: TokenSet,
    lr: f64,
    optimizer: Box<dyn RowOptimizer>,
    decay: Option<DecayTowardOriginal>,
    match_norm: Option<MatchRowNorm>,
    clamp_norm: Option<ClampRowNorm>,
}

impl Groups {
    /// All rows with the run's learning rate.
    pub(super) fn whole(tokens: TokenSet, start: &TokenRows, options: &TrainOptions) -> Result<Self> {
        let slots = (0..start.num_rows()).collect();
        Ok(Self {
            trained: vec![Group::new(slots, tokens, start, options.lr, options)?],
            frozen: Vec::new(),
            num_rows: start.num_rows(),
        })
    }

    /// The rows of tokens, some of which may have learning rates of their own; with what keeps their norms.
    pub(super) fn of_tokens<S>(
        tokens: &TokenSet,
        start: &TokenRows,
        table: &S,
        options: &TrainOptions,
    ) -> Result<Self>
    where
        S: EmbeddingSource<Error: Into<Error>>,
    {
        let (by_lr, frozen) = by_learning_rate(tokens.ids(), options);
        let mean = match options.match_norm {
            Some(NormTarget::Mean) => Some(mean_row_norm(table).map_err(Into::into)?),
            _ => None,
        };
        let groups = by_lr.into_iter().map(|(lr, slots)| {
            let ids = slots.iter().map(|slot| tokens.ids()[*slot].0);
            let tokens = TokenSet::new(ids, table.vocab_size())?;
            let start = select(start, &slots)?;
            let norms = match (options.match_norm, mean) {
                (None, _) => None,
                (Some(_), Some(mean)) => Some(vec![mean; slots.len()]),
                (Some(_), None) => Some(start_norms(&start, &tokens)?),
            };
            Ok(Group {
                match_norm: norms.map(MatchRowNorm::new).transpose()?,
                clamp_norm: options.max_row_norm.map(ClampRowNorm::new).transpose()?,
                ..Group::new(slots, tokens, &start, lr, options)?
            })
        });
        Ok(Self {
            trained: groups.collect::<Result<_>>()?,
            frozen,
            num_rows: tokens.len(),
        })
    }

    /// Whether every row is frozen.
    pub(super) fn is_frozen(&self) -> bool {
        self.trained.is_empty()
    }

    /// A gradient with zeros for frozen rows.
    pub(super) fn without_frozen(&self, mut gradient: TokenRows) -> Result<TokenRows> {
        if !self.frozen.is_empty() {
            let zeros = TokenRows::zeros(gradient.dtype(), self.frozen.len(), gradient.embedding_dim());
            assign(&mut gradient, &self.frozen, &zeros)?;
        }
        Ok(gradient)
    }

    /// One step of all rows that are not frozen, the learning rates times `factor`.
    pub(super) fn step(&mut self, rows: &mut TokenRows, gradient: &mut TokenRows, factor: f64) -> Result<()> {
        for group in &mut self.trained {
            if group.slots.len() == self.num_rows {
                group.step(rows, gradient, factor)?;
            } else {
                let mut own = select(rows, &group.slots)?;
                group.step(&mut own, &mut select(gradient, &group.slots)?, factor)?;
                assign(rows, &group.slots, &own)?;
            }
        }
        Ok(())
    }

    /// The memory of all optimizers as that of one, with zeros for frozen rows.
    pub(super) fn state(&self) -> Result<OptimizerState> {
        let mut all = OptimizerState::default();
        for group in &self.trained {
            let state = group.optimizer.state();
            all.step = state.step;
            for (name, own) in state.tensors {
                let place = all.tensors.iter().position(|(other, _)| *other == name);
                let place = place.unwrap_or_else(|| {
                    let zeros = TokenRows::zeros(own.dtype(), self.num_rows, own.embedding_dim());
                    all.tensors.push((name, zeros));
                    all.tensors.len() - 1
                });
                assign(&mut all.tensors[place].1, &group.slots, &own)?;
            }
        }
        Ok(all)
    }

    /// Gives each optimizer its part of such a memory.
    pub(super) fn load_state(&mut self, state: &OptimizerState) -> Result<()> {
        for (name, tensor) in &state.tensors {
            if tensor.num_rows() != self.num_rows {
                let reason = format!("has {} rows, not {}", tensor.num_rows(), self.num_rows);
                let name = name.clone();
                return Err(CoreError::OptimizerState { name, reason }.into());
            }
        }
        for group in &mut self.trained {
            let tensors = state
                .tensors
                .iter()
                .map(|(name, tensor)| Ok((name.clone(), select(tensor, &group.slots)?)));
            group.optimizer.load_state(OptimizerState {
                step: state.step,
                tensors: tensors.collect::<Result<_>>()?,
            })?;
        }
        Ok(())
    }
}

impl Group {
    fn new(
        slots: Vec<usize>,
        tokens: TokenSet,
        start: &TokenRows,
        lr: f64,
        options: &TrainOptions,
    ) -> Result<Self> {
        Ok(Self {
            slots,
            tokens,
            lr,
            optimizer: options.build_optimizer()?,
            decay: options.build_decay(start)?,
            match_norm: None,
            clamp_norm: None,
        })
    }

    fn step(&mut self, rows: &mut TokenRows, gradient: &mut TokenRows, factor: f64) -> Result<()> {
        self.optimizer.set_learning_rate(self.lr * factor);
        let mut hooks: Vec<&mut dyn OptimizerHook> = Vec::new();
        hooks.extend(self.decay.as_mut().map(|hook| hook as &mut dyn OptimizerHook));
        hooks.extend(
            self.match_norm
                .as_mut()
                .map(|hook| hook as &mut dyn OptimizerHook),
        );
        hooks.extend(
            self.clamp_norm
                .as_mut()
                .map(|hook| hook as &mut dyn OptimizerHook),
        );
        step_rows(&mut *self.optimizer, &mut hooks, &self.tokens, rows, gradient)?;
        Ok(())
    }
}

/// The slots of each learning rate, and those that are frozen.
fn by_learning_rate(ids: &[TokenId], options: &TrainOptions) -> (Vec<(f64, Vec<usize>)>, Vec<usize>) {
    let mut by_lr: Vec<(f64, Vec<usize>)> = Vec::new();
    let mut frozen = Vec::new();
    for (slot, id) in ids.iter().enumerate() {
        let own = options.token_lr.iter().find(|(own, _)| *own == id.0);
        let lr = own.map_or(options.lr, |(_, lr)| *lr);
        if own.is_some() && lr == 0.0 {
            frozen.push(slot);
        } else if let Some((_, slots)) = by_lr.iter_mut().find(|(other, _)| *other == lr) {
            slots.push(slot);
        } else {
            by_lr.push((lr, vec![slot]));
        }
    }
    (by_lr, frozen)
}

/// The norms of rows, to which they can be scaled.
fn start_norms(start: &TokenRows, tokens: &TokenSet) -> Result<Vec<f64>> {
    let norms = start.row_norms();
    let bad = |norm: &f64| !(*norm > 0.0 && norm.is_finite());
    match tokens.ids().iter().zip(&norms).find(|(_, norm)| bad(norm)) {
        None => Ok(norms),
        Some((id, norm)) => Err(Error::Setting(format!(
            "the row of token id {} starts with a norm of {norm}, to which no row can be scaled",
            id.0
        ))),
    }
}

/// Some of the rows, bit for bit.
fn select(rows: &TokenRows, slots: &[usize]) -> Result<TokenRows> {
    let (bytes, size) = (rows.to_le_bytes(), row_bytes(rows));
    let mut chosen = Vec::with_capacity(slots.len() * size);
    for slot in slots {
        chosen.extend_from_slice(bytes.get(slot * size..(slot + 1) * size).unwrap_or_default());
    }
    let (dtype, dim) = (rows.dtype(), rows.embedding_dim());
    Ok(TokenRows::from_le_bytes(dtype, slots.len(), dim, &chosen)?)
}

/// Puts rows in their places, bit for bit.
fn assign(rows: &mut TokenRows, slots: &[usize], values: &TokenRows) -> Result<()> {
    let (mut bytes, size) = (rows.to_le_bytes(), row_bytes(rows));
    let values = values.to_le_bytes();
    for (slot, value) in slots.iter().zip(values.chunks_exact(size.max(1))) {
        if let Some(place) = bytes.get_mut(slot * size..(slot + 1) * size) {
            place.copy_from_slice(value);
        }
    }
    let [num_rows, dim] = rows.shape();
    *rows = TokenRows::from_le_bytes(rows.dtype(), num_rows, dim, &bytes)?;
    Ok(())
}

fn row_bytes(rows: &TokenRows) -> usize {
    rows.dtype().size_in_bytes() * rows.embedding_dim()
}

//! What can be asked for.

use crate::{Error, InitError, Result, TokenId};

/// How the row of a token starts: a mode, then modifiers in their order.
///
/// Its text form (`Display`, `FromStr`) is `MODE[+MODIFIER]…[+seed:N]`, such as `mean+noise:0.01+norm-match+seed:7`:
///
/// | mode | row |
/// |---|---|
/// | `keep` | the table's own |
/// | `zeros` | zeros |
/// | `random[:STD]` | normal numbers of mean 0; `STD` is 0.02 by default |
/// | `mean[:others]` | the mean of the table's rows |
/// | `mean-covariance[:SCALE][:others]` | a normal sample with the rows' mean and `SCALE` times their covariance; `SCALE` is 1e-9 by default |
/// | `copy:ID` | the row of another token |
/// | `mean-of:ID,ID,…` | the mean of the rows of some tokens |
/// | `interpolate:A:B:T` | `(1 - T) * A + T * B` of two tokens' rows |
///
/// | modifier | does |
/// |---|---|
/// | `noise:STD` | adds normal numbers of mean 0 |
/// | `norm-match[:NORM]` | scales the row to an L2 norm; by default the mean norm of the table's rows |
///
/// Every row that is named or averaged is the frozen table's, whatever becomes of that token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowInit {
    /// What the row is made of.
    pub mode: InitMode,
    /// What is done to it, in order.
    pub modifiers: Vec<InitModifier>,
    /// Of all that is drawn. Each token draws from a stream of its own: its row depends on no other token.
    pub seed: u64,
}

/// What a row is made of.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum InitMode {
    /// The table's own row, bit for bit (PEFT's `init_weights=True`).
    #[default]
    Keep,
    /// Zeros.
    Zeros,
    /// Independent normal numbers of mean 0 (PEFT's `init_weights=False` has a `std` of 1).
    Normal {
        /// Standard deviation, at least 0.
        std: f64,
    },
    /// The mean of the table's rows.
    Mean {
        /// Which rows count.
        over: Population,
    },
    /// A sample of the normal distribution with the mean of the table's rows and `scale` times their covariance
    /// (divisor `V`): what transformers' `resize_token_embeddings` draws, with its `scale` of 1e-9.
    MeanCovariance {
        /// Factor on the covariance, at least 0; 1 draws a row like the table's.
        scale: f64,
        /// Which rows count.
        over: Population,
    },
    /// The row of another token.
    Copy(TokenId),
    /// The mean of the rows of some tokens (of a word's pieces, of a description), each as often as it is named.
    MeanOf(Vec<TokenId>),
    /// `(1 - t) * from + t * to`.
    Interpolate {
        /// The row at `t = 0`.
        from: TokenId,
        /// The row at `t = 1`.
        to: TokenId,
        /// Any finite number; outside 0 to 1 it extrapolates.
        t: f64,
    },
}

/// What is done to a row after its mode.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum InitModifier {
    /// Adds independent normal numbers of mean 0.
    Noise {
        /// Standard deviation, at least 0.
        std: f64,
    },
    /// Scales the row to an L2 norm.
    NormMatch {
        /// The norm, above 0; `None` is the mean norm of the table's rows.
        target: Option<f64>,
    },
}

/// The rows of the table that a mean is taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Population {
    /// All of them.
    #[default]
    All,
    /// All but those of the tokens that train: new rows of a grown table say nothing yet.
    Others,
}

impl RowInit {
    /// The `scale` of transformers' `resize_token_embeddings`.
    pub const COVARIANCE_SCALE: f64 = 1e-9;
    /// The usual `initializer_range` of transformers' configurations.
    pub const STD: f64 = 0.02;

    /// A mode alone, with seed 0.
    pub fn new(mode: InitMode) -> Self {
        Self {
            mode,
            ..Self::default()
        }
    }

    /// Adds a modifier, after those that are there.
    pub fn with(mut self, modifier: InitModifier) -> Self {
        self.modifiers.push(modifier);
        self
    }

    /// Sets the seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Whether the row stays the table's own: PEFT's `init_weights`.
    pub fn keeps_base(&self) -> bool {
        self.mode == InitMode::Keep && self.modifiers.is_empty()
    }

    /// Whether anything is drawn, so that the seed matters.
    pub fn draws(&self) -> bool {
        let noise = |modifier: &InitModifier| matches!(modifier, InitModifier::Noise { .. });
        matches!(
            self.mode,
            InitMode::Normal { .. } | InitMode::MeanCovariance { .. }
        ) || self.modifiers.iter().any(noise)
    }

    /// Checks all that can be told without a table.
    pub(super) fn check(&self) -> Result<()> {
        match &self.mode {
            InitMode::Normal { std } => at_least_zero("std", *std)?,
            InitMode::MeanCovariance { scale, .. } => at_least_zero("scale", *scale)?,
            InitMode::Interpolate { t, .. } if !t.is_finite() => {
                return Err(refused("t", *t, "a finite number"));
            }
            InitMode::MeanOf(ids) if ids.is_empty() => return Err(InitError::NoTokens.into()),
            _ => {}
        }
        for modifier in &self.modifiers {
            match modifier {
                InitModifier::Noise { std } => at_least_zero("noise", *std)?,
                InitModifier::NormMatch { target: Some(norm) } if !(*norm > 0.0 && norm.is_finite()) => {
                    return Err(refused("norm-match", *norm, "above 0"));
                }
                InitModifier::NormMatch { .. } => {}
            }
        }
        Ok(())
    }
}

impl InitMode {
    /// The tokens whose rows are named.
    pub(super) fn sources(&self) -> Vec<TokenId> {
        match self {
            Self::Copy(id) => vec![*id],
            Self::MeanOf(ids) => ids.clone(),
            Self::Interpolate { from, to, .. } => vec![*from, *to],
            _ => Vec::new(),
        }
    }
}

fn at_least_zero(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(refused(name, value, "at least 0"))
}

fn refused(name: &'static str, value: f64, must: &'static str) -> Error {
    Error::Hyperparameter { name, value, must }
}

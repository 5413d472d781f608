//! What a case says.

use serde::{Deserialize, Serialize};
use trainable_tokens_core::{
    Adam, AdamConfig, ClipGradNorm, DType, Decay, DecayTowardOriginal, EmbedScale, LayerOptions, MaxNorm,
    OptimizerHook, Padding, PaddingRule, RowOptimizer, Sgd, SgdConfig, TokenId, TokenRows,
};

/// The file of cases.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vectors {
    /// Version of the fields, 1.
    pub format_version: u32,
    /// What computed the expected values.
    pub generated_by: String,
    /// The cases.
    pub cases: Vec<VectorCase>,
}

/// One case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VectorCase {
    /// Its name; its tensors are `<name>.<tensor>`.
    pub name: String,
    /// What is done.
    #[serde(flatten)]
    pub operation: Operation,
    /// Clauses of SPEC.md that it covers.
    pub clauses: Vec<String>,
    /// Element type of the table; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// How far values may lie off, relative to the largest or to 1; 0 means equal bits.
    #[serde(default)]
    pub tolerance: f64,
    /// The kind of the error that must come instead of values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect_error: Option<String>,
}

/// What a case does with its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum Operation {
    /// Validates a token set.
    TokenSet {
        /// The ids.
        token_indices: Vec<u32>,
        /// Rows of the table.
        vocab_size: usize,
    },
    /// `table`, `rows` -> `output`; with `upstream`, also `gradient`.
    Lookup {
        /// The ids that train, in slot order.
        token_indices: Vec<u32>,
        /// The batch.
        input_ids: Vec<u32>,
        /// How the table is used.
        #[serde(default)]
        options: Options,
    },
    /// `table`, `rows` (of all adapters, stacked), `upstream` -> `output`, `gradient` (stacked).
    Several {
        /// The ids of each adapter, in slot order.
        adapters: Vec<Vec<u32>>,
        /// The weight of each active adapter; absent, the last wins.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        weights: Option<Vec<f64>>,
        /// The adapter of each example of a mixed batch, or none; absent, all are active.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        choice: Option<Vec<Option<usize>>>,
        /// The batch.
        input_ids: Vec<u32>,
        /// How the table is used.
        #[serde(default)]
        options: Options,
    },
    /// `table`, `rows`, `hidden`, `upstream` -> `logits`, `hidden_gradient`, `gradient`.
    Head {
        /// The ids that train, in slot order.
        token_indices: Vec<u32>,
    },
    /// `table`, `rows` -> `merged`; unmerging must give `table` again.
    Merge {
        /// The ids that train, in slot order.
        token_indices: Vec<u32>,
    },
    /// `rows`, `gradients` (of all steps, stacked) -> `rows_after` (stacked), and the memory after the last step.
    Optimizer {
        /// The update rule.
        optimizer: OptimizerSpec,
        /// What happens before each update, in order; decay takes the tensor `original`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        hooks: Vec<HookSpec>,
        /// How many steps there are.
        steps: usize,
    },
    /// Reads the directory: `rows`. Writing it from `table` and `rows` must give its bytes again.
    Adapter(AdapterFile),
    /// Reads `training_state.safetensors` in the directory: its tensors. Writing them must give its bytes again.
    TrainingState {
        /// The directory.
        directory: String,
        /// Steps taken.
        step: u64,
        /// What the trainer added.
        extra: serde_json::Value,
    },
}

/// An adapter directory and what was said when it was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AdapterFile {
    /// The directory.
    pub directory: String,
    /// Path of the module.
    pub module: String,
    /// Paths of the modules that are tied to it.
    pub tied: Vec<String>,
    /// The ids that train, in slot order.
    pub token_indices: Vec<u32>,
    /// Their strings.
    pub tokens: Vec<String>,
    /// How the rows were initialised.
    pub init: String,
    /// The release that the file names.
    pub library_version: String,
    /// Digest of `table`.
    pub base_digest: String,
}

/// How a table is used, by torch's names; what is absent is off.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The padding token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub padding_idx: Option<u32>,
    /// Whether the padding token trains all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub train_padding: bool,
    /// The factor on looked-up rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// Whether gradients are divided by the count of their id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scale_grad_by_freq: bool,
    /// The greatest norm of a looked-up row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_norm: Option<f64>,
}

/// The two kinds of scale.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// The number as it is.
    Exact(f64),
    /// The number rounded to the table's element type first.
    TableDtype(f64),
}

/// An update rule, by torch's names; what is absent has torch's default (SPEC.md O12).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are torch's")]
pub enum OptimizerSpec {
    Sgd {
        lr: f64,
        #[serde(default)]
        momentum: f64,
        #[serde(default)]
        dampening: f64,
        #[serde(default)]
        nesterov: bool,
        #[serde(default)]
        weight_decay: f64,
    },
    Adam {
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        #[serde(default)]
        weight_decay: f64,
        /// AdamW's decay instead of Adam's.
        #[serde(default)]
        decoupled: bool,
        #[serde(default)]
        amsgrad: bool,
    },
}

/// What happens before an update.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HookSpec {
    /// Clipping of the whole gradient's norm.
    ClipGradNorm {
        /// The limit.
        max_norm: f64,
    },
    /// Decay toward the tensor `original`.
    DecayTowardOriginal {
        /// The rate.
        weight_decay: f64,
    },
}

impl VectorCase {
    /// Whether a harness for tables of type `dtype` runs it.
    pub(super) fn runs_on(&self, dtype: DType) -> bool {
        self.dtype.as_ref().is_none_or(|name| *name == dtype.to_string())
    }
}

impl Options {
    pub(super) fn layer_options(&self) -> trainable_tokens_core::Result<LayerOptions> {
        let rule = if self.train_padding {
            PaddingRule::Train
        } else {
            PaddingRule::NoLookupGradient
        };
        Ok(LayerOptions {
            padding: self.padding_idx.map(|token| Padding {
                token: TokenId(token),
                rule,
            }),
            scale: self.scale.map(|scale| match scale {
                Scale::Exact(factor) => EmbedScale::Exact(factor),
                Scale::TableDtype(factor) => EmbedScale::TableDType(factor),
            }),
            scale_grad_by_freq: self.scale_grad_by_freq,
            max_norm: self.max_norm.map(MaxNorm::new).transpose()?,
        })
    }
}

impl OptimizerSpec {
    pub(crate) fn build(self) -> trainable_tokens_core::Result<Box<dyn RowOptimizer>> {
        Ok(match self {
            Self::Sgd {
                lr,
                momentum,
                dampening,
                nesterov,
                weight_decay,
            } => Box::new(Sgd::new(SgdConfig {
                lr,
                momentum,
                dampening,
                nesterov,
                weight_decay,
            })?),
            Self::Adam {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                decoupled,
                amsgrad,
            } => Box::new(Adam::new(AdamConfig {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                decay: if decoupled { Decay::Decoupled } else { Decay::L2 },
                amsgrad,
            })?),
        })
    }
}

impl HookSpec {
    pub(super) fn build(
        self,
        original: Option<&TokenRows>,
    ) -> trainable_tokens_core::Result<Box<dyn OptimizerHook>> {
        Ok(match self {
            Self::ClipGradNorm { max_norm } => Box::new(ClipGradNorm::new(max_norm)?),
            Self::DecayTowardOriginal { weight_decay } => {
                let original = original
                    .cloned()
                    .unwrap_or_else(|| TokenRows::zeros(DType::F32, 0, 0));
                Box::new(DecayTowardOriginal::new(weight_decay, original)?)
            }
        })
    }
}

//! How the paths of modules and the names of stored tensors go together.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;

use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// The base model of some families: what transformers' `AutoModel` is alone, and what lies under a prefix in a class with a
/// head. A checkpoint may be stored with the prefix or without it; transformers loads either into either.
#[derive(Debug)]
struct BaseModel {
    model_types: &'static [&'static str],
    /// `base_model_prefix` of transformers' classes, and a dot.
    prefix: &'static str,
    /// The path of the input embedding in it, which shows how a checkpoint is stored.
    embedding: &'static str,
    /// `tie_word_embeddings` of a config that does not say.
    tied: bool,
    /// Whether it is trained as a causal language model, whose modules have the prefix however they are stored. Encoders
    /// are used alone too, and their modules are named as they are stored.
    is_causal: bool,
}

const CAUSAL: BaseModel = BaseModel {
    model_types: &[],
    prefix: "model.",
    embedding: "embed_tokens",
    tied: false,
    is_causal: true,
};
const TRANSFORMER: BaseModel = BaseModel {
    prefix: "transformer.",
    embedding: "wte",
    ..CAUSAL
};
const ENCODER: BaseModel = BaseModel {
    embedding: "embeddings.word_embeddings",
    tied: true,
    is_causal: false,
    ..CAUSAL
};

/// Gathered from transformers' configs and classes.
static BASE_MODELS: [BaseModel; 12] = [
    BaseModel {
        model_types: &[
            "apertus",
            "arcee",
            "deepseek_v2",
            "deepseek_v3",
            "exaone4",
            "glm",
            "glm4",
            "glm4_moe",
            "gpt_oss",
            "granite",
            "granitemoe",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "mistral",
            "mixtral",
            "nemotron",
            "olmo",
            "olmo2",
            "olmo3",
            "persimmon",
            "phi",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "seed_oss",
            "stablelm",
        ],
        ..CAUSAL
    },
    BaseModel {
        model_types: &[
            "cohere",
            "cohere2",
            "ernie4_5",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "starcoder2",
            "xglm",
        ],
        tied: true,
        ..CAUSAL
    },
    BaseModel {
        model_types: &["opt"],
        embedding: "decoder.embed_tokens",
        tied: true,
        ..CAUSAL
    },
    BaseModel {
        model_types: &["gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "mpt"],
        tied: true,
        ..TRANSFORMER
    },
    BaseModel {
        model_types: &["codegen", "dbrx", "gptj"],
        ..TRANSFORMER
    },
    BaseModel {
        model_types: &["bloom", "falcon"],
        embedding: "word_embeddings",
        tied: true,
        ..TRANSFORMER
    },
    BaseModel {
        model_types: &["openai-gpt"],
        embedding: "tokens_embed",
        tied: true,
        ..TRANSFORMER
    },
    BaseModel {
        model_types: &["ctrl"],
        embedding: "w",
        tied: true,
        ..TRANSFORMER
    },
    BaseModel {
        model_types: &["gpt_neox"],
        prefix: "gpt_neox.",
        embedding: "embed_in",
        ..CAUSAL
    },
    BaseModel {
        model_types: &["biogpt"],
        prefix: "biogpt.",
        tied: true,
        ..CAUSAL
    },
    BaseModel {
        model_types: &["bert"],
        prefix: "bert.",
        ..ENCODER
    },
    BaseModel {
        model_types: &["camembert", "roberta", "xlm-roberta"],
        prefix: "roberta.",
        ..ENCODER
    },
];

/// First parts of the paths of what these classes have beside their base model.
const BESIDE: [&str; 9] = [
    "classifier",
    "cls",
    "embed_out",
    "lm_head",
    "multiple_choice_head",
    "output_projection",
    "qa_outputs",
    "score",
    "v_head",
];

/// Whether names have the base model's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    Prefixed,
    Bare,
}

/// How a checkpoint's tensors are stored, and how the modules of its model are named.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Naming {
    base: &'static BaseModel,
    stored: Spelling,
    modules: Spelling,
}

impl Naming {
    /// That of a model with this config and these tensors; `None` if only the stored names are known.
    pub(super) fn of<T>(
        config: &ModelConfig,
        tensors: &BTreeMap<String, T>,
        dir: &Path,
    ) -> Result<Option<Self>> {
        let model_type = config.model_type.as_deref().unwrap_or_default();
        let Some(base) = BASE_MODELS
            .iter()
            .find(|base| base.model_types.contains(&model_type))
        else {
            return Ok(None);
        };
        let alone = format!("{}.weight", base.embedding);
        let prefixed = format!("{}{alone}", base.prefix);
        let stored = match (tensors.contains_key(&prefixed), tensors.contains_key(&alone)) {
            (true, false) => Spelling::Prefixed,
            (false, true) => Spelling::Bare,
            (false, false) => return Ok(None),
            (true, true) => {
                return Err(Error::Unsupported {
                    path: dir.to_owned(),
                    what: format!(
                        "tensors {prefixed:?} and {alone:?} are both there, but are one module's: which counts is not known"
                    ),
                });
            }
        };
        let modules = if base.is_causal {
            Spelling::Prefixed
        } else {
            stored
        };
        Ok(Some(Self {
            base,
            stored,
            modules,
        }))
    }

    /// The same with modules named otherwise.
    pub(super) fn with_modules(self, modules: Spelling) -> Self {
        Self { modules, ..self }
    }

    /// The path of a module, or the name of a tensor, as this model's modules are named; `tensors` are those stored.
    pub(super) fn of_module<'n, T>(&self, name: &'n str, tensors: &BTreeMap<String, T>) -> Cow<'n, str> {
        self.spell(name, self.modules, tensors)
    }

    /// The same, as the checkpoint's tensors are.
    pub(super) fn of_stored<'n, T>(&self, name: &'n str, tensors: &BTreeMap<String, T>) -> Cow<'n, str> {
        self.spell(name, self.stored, tensors)
    }

    fn spell<'n, T>(&self, name: &'n str, spelling: Spelling, tensors: &BTreeMap<String, T>) -> Cow<'n, str> {
        match (spelling, self.spelling_of(name, tensors)) {
            (Spelling::Bare, Some(Spelling::Prefixed)) => name[self.base.prefix.len()..].into(),
            (Spelling::Prefixed, Some(Spelling::Bare)) => format!("{}{name}", self.base.prefix).into(),
            _ => name.into(),
        }
    }

    /// How the name of something of the base model is spelled; `None` if it is of something else.
    pub(super) fn spelling_of<T>(&self, name: &str, tensors: &BTreeMap<String, T>) -> Option<Spelling> {
        if name.starts_with(self.base.prefix) {
            return Some(Spelling::Prefixed);
        }
        let first = name.split('.').next().unwrap_or(name);
        let start = match self.stored {
            Spelling::Prefixed => format!("{}{first}.", self.base.prefix),
            Spelling::Bare => format!("{first}."),
        };
        let mut from = tensors.range::<str, _>((Bound::Included(start.as_str()), Bound::Unbounded));
        let is_part = from.next().is_some_and(|(stored, _)| stored.starts_with(&start));
        (is_part && !BESIDE.contains(&first)).then_some(Spelling::Bare)
    }

    /// The prefix.
    pub(super) fn prefix(&self) -> &'static str {
        self.base.prefix
    }

    /// Whether a causal language model is stored as a base model alone. Then it has a head nonetheless, and says this of
    /// whether that is tied.
    pub(crate) fn tied_if_bare(&self) -> Option<bool> {
        (self.base.is_causal && self.stored == Spelling::Bare).then_some(self.base.tied)
    }
}

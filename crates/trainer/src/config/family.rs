//! The families of models, and what their configs leave unsaid.

use super::model::{Activation, NormKind};
use super::names::{GEMMA2, GEMMA3, GPT2, LLAMA, Names, QWEN3};

/// What tells a family from the others besides the fields of its config, and the defaults of transformers for fields that
/// a config leaves out.
pub(super) struct Family {
    pub(super) model_type: &'static str,
    pub(super) names: &'static Names,
    pub(super) norm: NormKind,
    /// Whether the embedding is multiplied by the root of its width.
    pub(super) scales_embeddings: bool,
    /// Of queries, keys and values.
    pub(super) qkv_bias: Bias,
    /// Of attention's output.
    pub(super) output_bias: Bias,
    pub(super) mlp_bias: Bias,
    pub(super) window: Window,
    /// Whether the embedding has a `padding_idx`.
    pub(super) has_padding: bool,
    pub(super) activation: Activation,
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) norm_eps: f64,
    pub(super) sliding_window: Option<usize>,
    /// Families without one divide by the width of a head.
    pub(super) query_pre_attn_scalar: Option<f64>,
    /// The limit of attention scores; families without one have no such field.
    pub(super) attn_logit_softcapping: Option<f64>,
    pub(super) final_logit_softcapping: Option<f64>,
    pub(super) rope_theta: f64,
    /// The base in layers with a sliding window, where it is another.
    pub(super) local_rope_theta: Option<f64>,
    pub(super) tie_word_embeddings: bool,
    pub(super) pad_token_id: Option<i64>,
    pub(super) eos_token_id: Option<i64>,
}

/// Whether linear layers have biases.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// As the config says.
    Asked,
}

/// Which layers have a sliding window where the config does not list them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Window {
    /// None.
    Never,
    /// All, if there is a window.
    Everywhere,
    /// Those from `max_window_layers` on, if `use_sliding_window` says so.
    Late,
    /// All but every n-th.
    AllBut(usize),
}

const LLAMA_FAMILY: Family = Family {
    model_type: "llama",
    names: &LLAMA,
    norm: NormKind::Rms,
    scales_embeddings: false,
    qkv_bias: Bias::Asked,
    output_bias: Bias::Asked,
    mlp_bias: Bias::Asked,
    window: Window::Never,
    has_padding: true,
    activation: Activation::Silu,
    head_dim: None,
    max_position_embeddings: 2048,
    norm_eps: 1e-6,
    sliding_window: None,
    query_pre_attn_scalar: None,
    attn_logit_softcapping: None,
    final_logit_softcapping: None,
    rope_theta: 10_000.0,
    local_rope_theta: None,
    tie_word_embeddings: false,
    pad_token_id: None,
    eos_token_id: Some(2),
};

const QWEN2_FAMILY: Family = Family {
    model_type: "qwen2",
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    window: Window::Late,
    max_position_embeddings: 32_768,
    sliding_window: Some(4096),
    eos_token_id: None,
    ..LLAMA_FAMILY
};

const GEMMA_FAMILY: Family = Family {
    model_type: "gemma",
    norm: NormKind::RmsPlusOne,
    scales_embeddings: true,
    mlp_bias: Bias::Never,
    activation: Activation::GeluTanh,
    head_dim: Some(256),
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    pad_token_id: Some(0),
    eos_token_id: Some(1),
    ..LLAMA_FAMILY
};

const GEMMA2_FAMILY: Family = Family {
    model_type: "gemma2",
    names: &GEMMA2,
    window: Window::AllBut(2),
    sliding_window: Some(4096),
    query_pre_attn_scalar: Some(256.0),
    attn_logit_softcapping: Some(50.0),
    final_logit_softcapping: Some(30.0),
    ..GEMMA_FAMILY
};

static FAMILIES: [Family; 8] = [
    LLAMA_FAMILY,
    Family {
        model_type: "mistral",
        qkv_bias: Bias::Never,
        output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        window: Window::Everywhere,
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        ..LLAMA_FAMILY
    },
    QWEN2_FAMILY,
    Family {
        model_type: "qwen3",
        names: &QWEN3,
        qkv_bias: Bias::Asked,
        output_bias: Bias::Asked,
        head_dim: Some(128),
        ..QWEN2_FAMILY
    },
    GEMMA_FAMILY,
    GEMMA2_FAMILY,
    Family {
        model_type: "gemma3_text",
        names: &GEMMA3,
        window: Window::AllBut(6),
        max_position_embeddings: 131_072,
        attn_logit_softcapping: None,
        final_logit_softcapping: None,
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        ..GEMMA2_FAMILY
    },
    Family {
        model_type: "gpt2",
        names: &GPT2,
        norm: NormKind::Layer,
        qkv_bias: Bias::Always,
        output_bias: Bias::Always,
        mlp_bias: Bias::Always,
        has_padding: false,
        activation: Activation::GeluTanh,
        max_position_embeddings: 1024,
        norm_eps: 1e-5,
        tie_word_embeddings: true,
        eos_token_id: Some(50_256),
        ..LLAMA_FAMILY
    },
];

impl Family {
    pub(super) fn named(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }
}

impl Bias {
    pub(super) fn resolve(self, asked: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Asked => asked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::FAMILY_HINT;
    use super::*;

    #[test]
    fn the_hint_names_all_families() {
        for family in &FAMILIES {
            assert!(FAMILY_HINT.contains(family.model_type), "{}", family.model_type);
            assert!(Family::named(family.model_type).is_some());
        }
    }
}

//! What is known of a model.

use super::names::Names;

/// How the angular frequencies of rotary embeddings are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with sequences beyond the model's `max_position_embeddings`, so that low frequencies are stretched.
    Dynamic {
        /// By how much sequences may be longer.
        factor: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, with a ramp between (Llama 3).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
    },
    /// As Llama 3's, the ramp over dimensions, with longer queries and keys (`YaRN`, Peng et al. 2023).
    Yarn {
        /// The factor.
        factor: f64,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Dimensions that turn more often than this over the context are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this over the context are stretched.
        beta_slow: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
        /// Whether the ends of the ramp are whole dimensions.
        truncate: bool,
    },
    /// A divisor for each frequency, with longer queries and keys (`LongRoPE`, Ding et al. 2024).
    LongRope {
        /// The divisors, for a sequence of up to `original_max_position_embeddings`.
        short_factor: Box<[f64]>,
        /// The divisors, for a longer one.
        long_factor: Box<[f64]>,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
    },
}

/// Rotary position embeddings (Su et al. 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the angular frequencies.
    pub theta: f64,
    /// Their stretching.
    pub scaling: RopeScaling,
}

/// How a model knows where a token stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// A learned vector for each position is added to the embedding (GPT-2).
    Learned,
    /// Queries and keys are rotated.
    Rotary {
        /// In layers that see all earlier positions.
        full: Rope,
        /// In layers with a sliding window.
        sliding: Rope,
    },
}

/// What the queries of a layer see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerType {
    /// All earlier positions.
    Full,
    /// The last positions, as many as `sliding_window` says.
    Sliding,
}

/// How activations are normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// By their root mean square (Zhang and Sennrich 2019).
    Rms,
    /// The same with a weight that is stored less one (Gemma).
    RmsPlusOne,
    /// By mean and variance, with a bias (Ba et al. 2016).
    Layer,
}

/// The nonlinearity of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Φ(x)` (Hendrycks and Gimpel 2016).
    Gelu,
    /// GELU with tanh in the place of the error function.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The nonlinearity of one of transformers' names.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }
}

/// What the decoder needs of a model, with transformers' defaults; fields are named as in the `config.json` of most
/// families.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "they are those of a config.json")]
pub struct ModelConfig {
    /// `model_type`.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The nonlinearity of the feed-forward layer.
    pub activation: Activation,
    /// The norms.
    pub norm: NormKind,
    /// Added to the mean square, or the variance, in the norms.
    pub norm_eps: f64,
    /// What the embedding module multiplies rows by (Gemma).
    pub embed_scale: Option<f64>,
    /// How positions are told apart.
    pub positions: Positions,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// What the queries of each layer see.
    pub layer_types: Vec<LayerType>,
    /// Positions that a query of a sliding layer sees, itself included.
    pub sliding_window: Option<usize>,
    /// Attention scores are divided by the root of this: `head_dim` but for Gemma 2 and 3.
    pub query_pre_attn_scalar: f64,
    /// The limit of attention scores (Gemma 2).
    pub attn_logit_softcapping: Option<f64>,
    /// The limit of logits (Gemma 2).
    pub final_logit_softcapping: Option<f64>,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection of attention's output has a bias.
    pub output_bias: bool,
    /// Whether the projections of the feed-forward layer have biases.
    pub mlp_bias: bool,
    /// Whether the head shares the embedding table.
    pub tie_word_embeddings: bool,
    /// The embedding's `padding_idx`.
    pub pad_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    pub(crate) names: &'static Names,
}

impl ModelConfig {
    /// The path of the embedding module, as PEFT's files and `target_modules` spell it.
    pub fn embedding_module(&self) -> &'static str {
        self.names.embedding
    }

    /// The tensor of the embedding table in a checkpoint.
    pub fn embedding_tensor(&self) -> String {
        format!("{}.weight", self.names.embedding)
    }

    /// The path of the output layer.
    pub fn head_module(&self) -> &'static str {
        self.names.head
    }

    /// The last parts of the paths of the linear layers, but for the head: what PEFT's `all-linear` stands for.
    pub fn linear_layers(&self) -> Vec<&'static str> {
        self.names.linear()
    }

    /// The linear layers that weights of LoRA go to unless others are named, as in PEFT.
    pub fn lora_targets(&self) -> Vec<&'static str> {
        self.names.lora_targets()
    }

    /// The longest sequence that the model takes: its positions, times the factor of dynamic rotary embeddings.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn max_length(&self) -> usize {
        match self.positions {
            Positions::Rotary {
                full:
                    Rope {
                        scaling: RopeScaling::Dynamic { factor },
                        ..
                    },
                ..
            } => (self.max_position_embeddings as f64 * factor.max(1.0)) as usize,
            _ => self.max_position_embeddings,
        }
    }

    /// Whether what was computed of a text's first `before` tokens no longer counts when it has `after`: `LongRope` rotates all
    /// positions of a long text otherwise. (So do dynamic rotary embeddings with every token; as in transformers, that is let be.)
    pub(crate) fn rotates_anew(&self, before: usize, after: usize) -> bool {
        let Positions::Rotary { full, sliding } = &self.positions else {
            return false;
        };
        [full, sliding].iter().any(|rope| match &rope.scaling {
            RopeScaling::LongRope {
                original_max_position_embeddings: original,
                ..
            } => before as f64 <= *original && after as f64 > *original,
            _ => false,
        })
    }
}

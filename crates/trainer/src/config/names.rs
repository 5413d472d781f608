//! Where the modules of each family lie in its checkpoints.

/// Paths of a model's modules. What a family does not have tells what its layers do not do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) embedding: &'static str,
    /// The table of learned positions.
    pub(crate) positions: Option<&'static str>,
    /// The list of layers.
    pub(crate) layers: &'static str,
    /// The norm after the last layer.
    pub(crate) norm: &'static str,
    pub(crate) head: &'static str,
    pub(crate) layer: LayerNames,
}

/// Paths inside a layer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LayerNames {
    /// The norm of attention's input.
    pub(crate) attention_norm: &'static str,
    /// The norm of its output.
    pub(crate) post_attention_norm: Option<&'static str>,
    pub(crate) projections: ProjectionNames,
    /// The norms of each head of queries and of keys.
    pub(crate) head_norms: Option<[&'static str; 2]>,
    pub(crate) output: &'static str,
    /// The norm of the feed-forward layer's input.
    pub(crate) mlp_norm: &'static str,
    /// The norm of its output.
    pub(crate) post_mlp_norm: Option<&'static str>,
    /// What gates the feed-forward layer, if anything does.
    pub(crate) gate: Option<&'static str>,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
    pub(crate) layout: WeightLayout,
}

/// The projections to queries, keys and values.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ProjectionNames {
    Separate([&'static str; 3]),
    /// One layer, its outputs one after the other.
    Fused(&'static str),
}

/// How the weights of linear layers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightLayout {
    /// `[out, in]`, torch's `Linear`.
    OutIn,
    /// `[in, out]`, the `Conv1D` of GPT-2.
    InOut,
}

const LLAMA_LAYER: LayerNames = LayerNames {
    attention_norm: "input_layernorm",
    post_attention_norm: None,
    projections: ProjectionNames::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    head_norms: None,
    output: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    post_mlp_norm: None,
    gate: Some("mlp.gate_proj"),
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    layout: WeightLayout::OutIn,
};

const HEAD_NORMS: Option<[&str; 2]> = Some(["self_attn.q_norm", "self_attn.k_norm"]);

const fn with_layer(layer: LayerNames) -> Names {
    Names {
        embedding: "model.embed_tokens",
        positions: None,
        layers: "model.layers",
        norm: "model.norm",
        head: "lm_head",
        layer,
    }
}

pub(super) static LLAMA: Names = with_layer(LLAMA_LAYER);

pub(super) static QWEN3: Names = with_layer(LayerNames {
    head_norms: HEAD_NORMS,
    ..LLAMA_LAYER
});

const GEMMA2_LAYER: LayerNames = LayerNames {
    post_attention_norm: Some("post_attention_layernorm"),
    mlp_norm: "pre_feedforward_layernorm",
    post_mlp_norm: Some("post_feedforward_layernorm"),
    ..LLAMA_LAYER
};

pub(super) static GEMMA2: Names = with_layer(GEMMA2_LAYER);

pub(super) static GEMMA3: Names = with_layer(LayerNames {
    head_norms: HEAD_NORMS,
    ..GEMMA2_LAYER
});

pub(super) static GPT2: Names = Names {
    embedding: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    norm: "transformer.ln_f",
    head: "lm_head",
    layer: LayerNames {
        attention_norm: "ln_1",
        post_attention_norm: None,
        projections: ProjectionNames::Fused("attn.c_attn"),
        head_norms: None,
        output: "attn.c_proj",
        mlp_norm: "ln_2",
        post_mlp_norm: None,
        gate: None,
        up: "mlp.c_fc",
        down: "mlp.c_proj",
        layout: WeightLayout::InOut,
    },
};

impl Names {
    /// The last parts of the paths of linear layers, but for the head, each once.
    pub(super) fn linear(&self) -> Vec<&'static str> {
        let LayerNames {
            output,
            gate,
            up,
            down,
            ..
        } = self.layer;
        let paths = self.layer.projections.paths().iter().copied();
        let mut found: Vec<&str> = Vec::new();
        for path in paths.chain([output]).chain(gate).chain([up, down]) {
            let name = last_part(path);
            if !found.contains(&name) {
                found.push(name);
            }
        }
        found
    }

    /// PEFT's choice for these families (`peft/utils/constants.py`,
    /// `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`): queries and values, or the fused layer.
    pub(super) fn lora_targets(&self) -> Vec<&'static str> {
        match &self.layer.projections {
            ProjectionNames::Separate([query, _, value]) => vec![last_part(query), last_part(value)],
            ProjectionNames::Fused(fused) => vec![last_part(fused)],
        }
    }
}

impl ProjectionNames {
    fn paths(&self) -> &[&'static str] {
        match self {
            Self::Separate(paths) => paths,
            Self::Fused(path) => std::slice::from_ref(path),
        }
    }
}

fn last_part(path: &'static str) -> &'static str {
    path.rsplit('.').next().unwrap_or(path)
}

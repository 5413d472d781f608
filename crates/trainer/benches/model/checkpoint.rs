//! Models with a large vocabulary and random weights, written as they are made.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

const VOCAB: usize = 256_000;
const HIDDEN: usize = 512;
const INNER: usize = 1536;
const LAYERS: usize = 4;
const QUERY_HEADS: usize = 8;
const KEY_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
/// The standard deviation of the weights.
const DEVIATION: f64 = 0.02;

/// What the model looks like.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    Llama,
    Gemma2,
}

impl Shape {
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "llama" => Self::Llama,
            "gemma2" => Self::Gemma2,
            other => panic!("--make {other}: expected llama or gemma2"),
        }
    }

    fn config(self) -> Value {
        let mut config = json!({
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": QUERY_HEADS,
            "num_key_value_heads": KEY_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": true,
        });
        let own = match self {
            Self::Llama => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_act": "silu",
            }),
            Self::Gemma2 => json!({
                "architectures": ["Gemma2ForCausalLM"],
                "model_type": "gemma2",
                "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": 512,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "pad_token_id": 0,
            }),
        };
        if let (Value::Object(config), Value::Object(own)) = (&mut config, own) {
            config.extend(own);
        }
        config
    }

    /// Names and shapes of all tensors.
    fn tensors(self) -> Vec<(String, Vec<usize>)> {
        let (queries, keys) = (QUERY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
        let norms: &[&str] = match self {
            Self::Llama => &["input_layernorm", "post_attention_layernorm"],
            Self::Gemma2 => &[
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ],
        };
        let linear = [
            ("self_attn.q_proj", [queries, HIDDEN]),
            ("self_attn.k_proj", [keys, HIDDEN]),
            ("self_attn.v_proj", [keys, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, queries]),
            ("mlp.gate_proj", [INNER, HIDDEN]),
            ("mlp.up_proj", [INNER, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INNER]),
        ];
        for layer in 0..LAYERS {
            let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
            tensors.extend(linear.map(|(module, shape)| (name(module), shape.to_vec())));
            tensors.extend(norms.iter().map(|module| (name(module), vec![HIDDEN])));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
        tensors
    }

    /// The value of every norm's weight: a norm that does nothing. Gemma adds one to its weights.
    fn norm(self) -> f32 {
        match self {
            Self::Llama => 1.0,
            Self::Gemma2 => 0.0,
        }
    }
}

/// Writes `config.json` and `model.safetensors`, unless the directory is there.
pub(crate) fn write(shape: Shape, dir: &Path) {
    if dir.exists() {
        return;
    }
    let unfinished = dir.with_extension("tmp");
    fs::create_dir_all(&unfinished).unwrap();
    let config = serde_json::to_vec_pretty(&shape.config()).unwrap();
    fs::write(unfinished.join("config.json"), config).unwrap();
    weights(shape, &unfinished.join("model.safetensors"));
    fs::rename(unfinished, dir).unwrap();
}

fn weights(shape: Shape, path: &Path) {
    let tensors = shape.tensors();
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in &tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(0);
    for (_, dims) in &tensors {
        let norm = (dims.len() == 1).then(|| shape.norm());
        for _ in 0..dims.iter().product() {
            let value = norm.unwrap_or_else(|| normal(&mut random));
            file.write_all(&value.to_le_bytes()).unwrap();
        }
    }
    file.flush().unwrap();
}

/// A normal number (Box and Muller 1958).
#[allow(clippy::cast_possible_truncation)]
fn normal(random: &mut ChaCha8Rng) -> f32 {
    let (radius, angle): (f64, f64) = (random.random_range(1e-12..1.0), random.random());
    (DEVIATION * (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

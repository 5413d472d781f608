//! What the layers of a model do, by the fields of its config.

use super::family::{Family, Window};
use super::model::{Activation, LayerType};
use super::parse::{Raw, Refusal, unsupported};

/// The nonlinearity of the feed-forward layers.
pub(super) fn activation(raw: &Raw, family: &Family) -> Result<Activation, Refusal> {
    // Gemma 2 and 3 renamed the field; the first Gemma's configs mean the approximation by plain `gelu`.
    let (field, name) = if family.query_pre_attn_scalar.is_some() {
        ("hidden_activation", &raw.hidden_activation)
    } else {
        ("hidden_act", &raw.hidden_act)
    };
    match name.as_deref() {
        None => Ok(family.activation),
        Some("gelu") if family.model_type == "gemma" => Ok(Activation::GeluTanh),
        Some(name) => named(field, name),
    }
}

/// The nonlinearity that a field names as transformers does.
pub(super) fn named(field: &str, name: &str) -> Result<Activation, Refusal> {
    let hint = "models here can have gelu, gelu_new, gelu_pytorch_tanh, relu and silu";
    Activation::named(name).ok_or_else(|| unsupported(field, name, hint))
}

/// What `sliding_window` comes to.
pub(super) fn window(raw: &Raw, family: &Family) -> Option<usize> {
    match family.window {
        Window::Never => None,
        Window::Late if raw.use_sliding_window != Some(true) => None,
        _ => raw.sliding_window.or(family.sliding_window),
    }
}

/// What the queries of each layer see.
pub(super) fn layer_types(raw: &Raw, family: &Family, layers: usize) -> Result<Vec<LayerType>, Refusal> {
    let slides = |slides: bool| {
        if slides {
            LayerType::Sliding
        } else {
            LayerType::Full
        }
    };
    let window = window(raw, family);
    let pattern =
        |is_sliding: &dyn Fn(usize) -> bool| Ok((0..layers).map(|at| slides(is_sliding(at))).collect());
    match (family.window, &raw.layer_types) {
        (Window::Never, _) => pattern(&|_| false),
        (Window::Everywhere, _) => pattern(&|_| window.is_some()),
        (_, Some(names)) => listed(names, layers),
        (Window::Late, None) => {
            let first = raw.max_window_layers.unwrap_or(28);
            pattern(&|at| window.is_some() && at >= first)
        }
        (Window::AllBut(period), None) => match raw.sliding_window_pattern.unwrap_or(period) {
            0 => Err(Refusal::Invalid("sliding_window_pattern is 0".to_owned())),
            period => pattern(&|at| !(at + 1).is_multiple_of(period)),
        },
    }
}

fn listed(names: &[String], layers: usize) -> Result<Vec<LayerType>, Refusal> {
    if names.len() != layers {
        return Err(Refusal::Invalid(format!(
            "layer_types lists {} layers, but num_hidden_layers is {layers}",
            names.len()
        )));
    }
    let types = names.iter().map(|name| match name.as_str() {
        "full_attention" => Ok(LayerType::Full),
        "sliding_attention" => Ok(LayerType::Sliding),
        other => {
            let hint = "the decoder implements full_attention and sliding_attention";
            Err(unsupported("layer type", other, hint))
        }
    });
    types.collect()
}

#[cfg(test)]
mod tests {
    use super::super::model::{ModelConfig, Positions, Rope, RopeScaling};
    use super::super::parse::config;
    use super::*;

    const FULL: LayerType = LayerType::Full;
    const SLIDING: LayerType = LayerType::Sliding;

    /// A small config of a family, with more fields.
    fn family(model_type: &str, fields: &str) -> ModelConfig {
        let sizes = r#""vocab_size":10,"hidden_size":8,"intermediate_size":4,"num_hidden_layers":3,"num_attention_heads":2"#;
        config(format!(r#"{{"model_type":"{model_type}",{sizes}{fields}}}"#).as_bytes()).unwrap()
    }

    #[test]
    fn what_is_left_out_is_not_what_is_null() {
        let gemma2 = family("gemma2", "");
        assert_eq!((gemma2.head_dim, gemma2.pad_token_id), (256, Some(0)));
        assert_eq!(gemma2.eos_token_ids, [1]);
        let caps = |config: &ModelConfig| (config.attn_logit_softcapping, config.final_logit_softcapping);
        assert_eq!(caps(&gemma2), (Some(50.0), Some(30.0)));
        let null = r#","attn_logit_softcapping":null,"final_logit_softcapping":null,"pad_token_id":null,"eos_token_id":null"#;
        let gemma2 = family("gemma2", null);
        assert_eq!(caps(&gemma2), (None, None));
        assert_eq!((gemma2.pad_token_id, gemma2.eos_token_ids.len()), (None, 0));
        assert_eq!(family("mistral", "").sliding_window, Some(4096));
        let mistral = family("mistral", r#","sliding_window":null"#);
        assert_eq!(
            (mistral.sliding_window, mistral.layer_types),
            (None, vec![FULL; 3])
        );
    }

    /// The exact error function where a config says so, but for the first Gemma, whose `gelu` transformers takes for the other.
    #[test]
    fn gelu_is_exact_but_for_the_first_gemma() {
        for (model_type, fields, activation) in [
            ("llama", r#","hidden_act":"gelu""#, Activation::Gelu),
            ("gpt2", r#","activation_function":"gelu""#, Activation::Gelu),
            ("gemma2", r#","hidden_activation":"gelu""#, Activation::Gelu),
            ("gemma", r#","hidden_act":"gelu""#, Activation::GeluTanh),
            ("gemma2", r#","hidden_act":"gelu""#, Activation::GeluTanh),
            ("qwen2", r#","hidden_act":"relu""#, Activation::Relu),
        ] {
            assert_eq!(
                family(model_type, fields).activation,
                activation,
                "{model_type} {fields}"
            );
        }
    }

    #[test]
    fn windows_are_where_each_family_has_them() {
        let late = r#","use_sliding_window":true,"max_window_layers":2,"sliding_window":5"#;
        let listed = r#","layer_types":["full_attention","full_attention","sliding_attention"]"#;
        for (model_type, fields, types) in [
            ("llama", r#","sliding_window":5"#, [FULL; 3]),
            ("mistral", r#","sliding_window":5"#, [SLIDING; 3]),
            ("qwen2", r#","sliding_window":5"#, [FULL; 3]),
            ("qwen3", late, [FULL, FULL, SLIDING]),
            ("gemma", r#","sliding_window":5"#, [FULL; 3]),
            ("gemma2", "", [SLIDING, FULL, SLIDING]),
            ("gemma2", listed, [FULL, FULL, SLIDING]),
            ("gemma3_text", "", [SLIDING; 3]),
            (
                "gemma3_text",
                r#","sliding_window_pattern":3"#,
                [SLIDING, SLIDING, FULL],
            ),
        ] {
            assert_eq!(
                family(model_type, fields).layer_types,
                types,
                "{model_type} {fields}"
            );
        }
    }

    #[test]
    fn gemma_3s_old_spelling_scales_only_layers_without_a_window() {
        let old = r#","rope_theta":5e5,"rope_local_base_freq":100,"rope_scaling":{"type":"linear","rope_type":"linear","factor":8}"#;
        let positions = Positions::Rotary {
            full: Rope {
                theta: 5e5,
                scaling: RopeScaling::Linear { factor: 8.0 },
            },
            sliding: Rope {
                theta: 100.0,
                scaling: RopeScaling::Default,
            },
        };
        assert_eq!(family("gemma3_text", old).positions, positions);
    }

    #[test]
    fn gpt2_has_names_of_its_own() {
        let json = r#"{"model_type":"gpt2","vocab_size":10,"n_embd":8,"n_layer":1,"n_head":2,"n_positions":6,"n_inner":null,"layer_norm_epsilon":0.5,"activation_function":"gelu_new","pad_token_id":3}"#;
        let config = config(json.as_bytes()).unwrap();
        assert_eq!(
            (config.hidden_size, config.intermediate_size, config.head_dim),
            (8, 32, 4)
        );
        assert_eq!((config.norm_eps, config.max_position_embeddings), (0.5, 6));
        // Its embedding has no padding.
        assert_eq!((config.pad_token_id, config.tie_word_embeddings), (None, true));
        assert_eq!(config.embedding_module(), "transformer.wte");
        assert_eq!(config.linear_layers(), ["c_attn", "c_proj", "c_fc"]);
        assert_eq!(config.lora_targets(), ["c_attn"]);
    }

    #[test]
    fn layers_that_are_none_are_refused() {
        for (fields, culprit) in [
            (r#""layer_types":["full_attention"]"#, "lists 1 layers"),
            (
                r#""layer_types":["full_attention","chunked_attention"]"#,
                "'chunked_attention'",
            ),
            (r#""sliding_window_pattern":0"#, "sliding_window_pattern is 0"),
            (r#""sliding_window":null"#, "sliding_window is missing"),
            (
                r#""hidden_activation":"quick_gelu""#,
                "hidden_activation 'quick_gelu'",
            ),
            (
                r#""use_bidirectional_attention":true"#,
                "use_bidirectional_attention 'true'",
            ),
        ] {
            let json = format!(
                r#"{{"model_type":"gemma2","vocab_size":10,"hidden_size":8,"intermediate_size":4,"num_hidden_layers":2,"num_attention_heads":2,{fields}}}"#
            );
            let (Refusal::Invalid(message) | Refusal::Unsupported { what: message, .. }) =
                config(json.as_bytes()).unwrap_err();
            assert!(message.contains(culprit), "{message}");
        }
    }
}

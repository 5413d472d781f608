//! The names of LoRA's weights in a file.

/// What the name of a tensor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// One of the two factors of the module at this path.
    Factor(&'a str, Factor),
    /// The weight below the factors of the module at this path, which PEFT saves of embeddings and their heads.
    Base(&'a str),
    /// Something else of LoRA's, of the module at this path.
    Other(&'a str),
    /// Not LoRA's.
    Foreign,
}

/// The factors that a module can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Factor {
    /// `[r, in]`.
    LinearA,
    /// `[out, r]`.
    LinearB,
    /// `[r, V]`.
    EmbeddingA,
    /// `[D, r]`.
    EmbeddingB,
}

const PREFIX: &str = "base_model.model.";
const MARK: &str = ".lora_";
const BASE: &str = ".base_layer.weight";

impl Factor {
    const ALL: [Self; 4] = [Self::LinearA, Self::LinearB, Self::EmbeddingA, Self::EmbeddingB];

    fn name(self) -> &'static str {
        match self {
            Self::LinearA => "lora_A.weight",
            Self::LinearB => "lora_B.weight",
            Self::EmbeddingA => "lora_embedding_A",
            Self::EmbeddingB => "lora_embedding_B",
        }
    }

    /// Its shape, in words.
    pub(super) fn shape(self) -> &'static str {
        match self {
            Self::LinearA => "[r, in]",
            Self::LinearB => "[out, r]",
            Self::EmbeddingA => "[r, V]",
            Self::EmbeddingB => "[D, r]",
        }
    }

    /// The name of the factor of the module at `path`.
    pub(crate) fn key(self, path: &str) -> String {
        format!("{PREFIX}{path}.{}", self.name())
    }
}

pub(super) fn parse(name: &str) -> Key<'_> {
    let Some(at) = name.rfind(MARK) else {
        let base = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(BASE));
        return base.map_or(Key::Foreign, Key::Base);
    };
    let head = &name[..at];
    let path = head.strip_prefix(PREFIX).unwrap_or(head);
    let factor = Factor::ALL
        .into_iter()
        .find(|factor| name[at + 1..] == *factor.name());
    match factor {
        Some(factor) if name.starts_with(PREFIX) && !path.is_empty() => Key::Factor(path, factor),
        _ => Key::Other(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_names_are_factors() {
        for factor in Factor::ALL {
            let key = factor.key("model.layers.0.q_proj");
            assert_eq!(parse(&key), Key::Factor("model.layers.0.q_proj", factor));
        }
        for other in [
            "base_model.model.q.lora_A.default.weight",
            "base_model.model.q.lora_B.bias",
            "base_model.model.q.lora_magnitude_vector",
            "base_model.model.q.lora_A",
            "q.lora_A.weight",
        ] {
            assert_eq!(parse(other), Key::Other("q"), "{other}");
        }
        assert_eq!(
            parse("base_model.model.lm_head.base_layer.weight"),
            Key::Base("lm_head")
        );
        for foreign in ["base_model.model.lm_head.weight", "lora_A.weight", ""] {
            assert_eq!(parse(foreign), Key::Foreign, "{foreign}");
        }
    }
}

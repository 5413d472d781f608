//! The names that checkpoints of encoders have for their parts.

use trainable_tokens_format::Checkpoint;

use crate::config::EncoderConfig;

/// Where the parts of an encoder lie in its checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    /// `bert.` or `roberta.`, and nothing where the encoder's modules are named without.
    prefix: &'static str,
    head: Option<HeadNames>,
}

/// The parts of a head of masked language modelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadNames {
    pub(crate) dense: &'static str,
    pub(crate) norm: &'static str,
    /// The module that may share the embedding's table.
    pub(crate) decoder: &'static str,
    /// The tensor of the logits' bias, by both of its names.
    pub(crate) bias: [&'static str; 2],
}

const BERT: HeadNames = HeadNames {
    dense: "cls.predictions.transform.dense",
    norm: "cls.predictions.transform.LayerNorm",
    decoder: "cls.predictions.decoder",
    bias: ["cls.predictions.bias", "cls.predictions.decoder.bias"],
};
const ROBERTA: HeadNames = HeadNames {
    dense: "lm_head.dense",
    norm: "lm_head.layer_norm",
    decoder: "lm_head.decoder",
    bias: ["lm_head.bias", "lm_head.decoder.bias"],
};

const EMBEDDING: &str = "embeddings.word_embeddings";

impl Names {
    /// Looks at the names of the checkpoint's tensors.
    pub(crate) fn of(config: &EncoderConfig, checkpoint: &Checkpoint) -> Self {
        let (prefix, head) = if config.model_type == "bert" {
            ("bert.", BERT)
        } else {
            ("roberta.", ROBERTA)
        };
        let embedding = format!("{prefix}{EMBEDDING}");
        let is_bare = checkpoint.module_name(&embedding) == EMBEDDING;
        let has_head = checkpoint.contains(&format!("{}.weight", head.dense));
        Self {
            prefix: if is_bare { "" } else { prefix },
            head: has_head.then_some(head),
        }
    }

    /// The head, if the checkpoint has one.
    pub(crate) fn head(&self) -> Option<HeadNames> {
        self.head
    }

    /// The ends of the paths of the linear layers, but for the output layer. No other module's path ends so; a pooler's
    /// ends with `dense` too.
    pub(crate) fn linear(&self) -> Vec<&'static str> {
        let layer = ["query", "key", "value", "intermediate.dense", "output.dense"];
        layer
            .into_iter()
            .chain(self.head.map(|head| head.dense))
            .collect()
    }

    /// Whether a module is a linear layer of the head.
    pub(crate) fn is_of_head(&self, path: &str) -> bool {
        self.head
            .is_some_and(|head| path == head.dense || path == head.decoder)
    }

    /// The path of a module of the encoder.
    pub(crate) fn module(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The path of the embedding module, as PEFT's files and `target_modules` spell it.
    pub(crate) fn embedding(&self) -> String {
        self.module(EMBEDDING)
    }
}

//! The names that transformers' architectures give to their tables.

use super::ModelConfig;

/// Last parts of the path of an input embedding, the more telling first. Gathered from `get_input_embeddings()` of
/// the language models of transformers.
const EMBEDDINGS: [&str; 12] = [
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "tokens_embed",
    "word_embedding",
    "embeddings",
    "input_embedding",
    "embedding",
    "w",
];

/// Heads, and the tensor that shows that a model has this one where the table is not its own. The first that fits
/// counts.
const HEADS: [(&str, &str); 15] = [
    ("cls.predictions.decoder", "cls.predictions."),
    ("lm_head.decoder", "lm_head.bias"),
    ("lm_head.decoder", "lm_head.dense.weight"),
    ("lm_head.out_proj", "lm_head.out_proj."),
    ("generator_lm_head", "generator_"),
    ("predictions.decoder", "predictions."),
    ("vocab_projector", "vocab_projector."),
    ("pred_layer.proj", "pred_layer."),
    ("lm_loss", "lm_loss."),
    ("embed_out", "embed_out."),
    ("output_projection", "output_projection."),
    ("proj_out", "proj_out."),
    ("decoder", "decoder.bias"),
    ("head", "head.weight"),
    ("lm_head", ""),
];

/// Heads of classes, by the start of their names, that no tensor shows when they are tied.
const HEADS_OF: [(&str, &str); 9] = [
    ("BlipFor", "text_decoder.cls.predictions.decoder"),
    ("CTRL", "lm_head"),
    ("Funnel", "lm_head"),
    ("ModernBertDecoder", "decoder"),
    ("Whisper", "proj_out"),
    ("BioGpt", "output_projection"),
    ("TrOCR", "output_projection"),
    ("GPTNeoXJapanese", "embed_out"),
    ("Kosmos2", "text_model.lm_head"),
];

/// Starts of the names of classes that tie nothing, whatever their config says.
const NEVER_TIED: [&str; 6] = [
    "BigBirdPegasusForCausalLM",
    "CpmAnt",
    "IBert",
    "Kosmos2_5",
    "Luke",
    "T5GemmaFor",
];

/// Ends of the names of classes that compute logits over the vocabulary.
const WITH_HEAD: [&str; 10] = [
    "BertGenerationDecoder",
    "Text2Text",
    "ForCausalLM",
    "LMHeadModel",
    "WithLMHeadModel",
    "ForMaskedLM",
    "ForConditionalGeneration",
    "ForPreTraining",
    "MTModel",
    "DoubleHeadsModel",
];

/// Ends of the names of other classes of transformers.
const WITHOUT_HEAD: [&str; 7] = [
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForTextEncoding",
    "ForImageTextRetrieval",
];

/// What names tell of a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Roles {
    pub(super) input_embedding: Option<String>,
    pub(super) head: Option<String>,
    pub(super) tied: Vec<String>,
}

/// The roles in a model with these tensors, sorted. Nothing is known of a class that is not one of transformers.
///
/// A causal language model that is stored as its base model has a head whatever the class; `tied_if_bare` tells whether that
/// is tied if the config does not.
pub(super) fn roles(config: &ModelConfig, tensors: &[&str], tied_if_bare: Option<bool>) -> Roles {
    let class = config.architecture.as_deref().unwrap_or_default();
    let is_one_of = |ends: &[&str]| ends.iter().any(|end| class.ends_with(end));
    let has_head = is_one_of(&WITH_HEAD) || tied_if_bare.is_some();
    if !has_head && !is_one_of(&WITHOUT_HEAD) {
        return Roles::default();
    }
    let Some(embedding) = input_embedding(tensors) else {
        return Roles::default();
    };
    let has = |path: &str| tensors.binary_search(&format!("{path}.weight").as_str()).is_ok();
    let head = has_head.then(|| head(class, tensors)).flatten();
    let is_tied = match config.tie_word_embeddings {
        _ if NEVER_TIED.iter().any(|start| class.starts_with(start)) => false,
        Some(tied) => tied,
        None => head.as_ref().is_some_and(|head| !has(head)) && tied_if_bare != Some(false),
    };
    let mut tied = Vec::new();
    if is_tied {
        tied.extend(stacks(&embedding, tensors));
        tied.extend(head.clone());
        tied.sort();
    }
    Roles {
        head: head.filter(|head| has(head) && !tied.contains(head)),
        input_embedding: Some(embedding),
        tied,
    }
}

/// The module whose table looks most like that of an input embedding.
fn input_embedding(tensors: &[&str]) -> Option<String> {
    let rank = |path: &str| {
        let last = path.rsplit('.').next()?;
        let kind = EMBEDDINGS.iter().position(|name| *name == last)?;
        // An encoder takes the ids; then the shorter path is the outer model.
        Some((
            kind,
            path.split('.').any(|part| part == "decoder"),
            path.matches('.').count(),
        ))
    };
    let tables = tensors.iter().filter_map(|name| name.strip_suffix(".weight"));
    let ranked = tables
        .filter(|path| !is_in_layer(path))
        .filter_map(|path| Some((rank(path)?, path)));
    ranked.min().map(|(_, path)| path.to_owned())
}

/// The head: one with a table of its own, or one that other tensors of the model show.
fn head(class: &str, tensors: &[&str]) -> Option<String> {
    let own = tensors
        .iter()
        .filter_map(|name| name.strip_suffix(".weight"))
        .find(|path| is_head(path) && !is_in_layer(path));
    let shown = || {
        let shown = |(_, sign): &&(&str, &str)| tensors.iter().any(|name| name.starts_with(sign));
        HEADS.iter().find(shown).map(|(head, _)| *head)
    };
    let known = || {
        let known = |(start, _): &&(&str, &str)| class.starts_with(start);
        HEADS_OF.iter().find(known).map(|(_, head)| *head)
    };
    own.or_else(known).or_else(shown).map(str::to_owned)
}

/// The embeddings of encoder and decoder that are the shared one.
fn stacks(embedding: &str, tensors: &[&str]) -> Vec<String> {
    let Some(outer) = embedding.strip_suffix("shared") else {
        return Vec::new();
    };
    let stacks = ["decoder", "encoder"].map(|stack| format!("{outer}{stack}."));
    let present = stacks
        .into_iter()
        .filter(|stack| tensors.iter().any(|name| name.starts_with(stack)));
    present.map(|stack| format!("{stack}embed_tokens")).collect()
}

/// Whether a path is named as heads are.
pub(super) fn is_head(path: &str) -> bool {
    HEADS.iter().any(|(head, _)| {
        path.strip_suffix(head).is_some_and(|outer| match *head {
            // Too plain a name inside a model.
            "decoder" | "head" => outer.is_empty(),
            _ => outer.is_empty() || outer.ends_with('.'),
        })
    })
}

/// Whether the last part of a path speaks of an embedding.
pub(super) fn is_embedding(path: &str) -> bool {
    let last = path.rsplit('.').next().unwrap_or(path);
    EMBEDDINGS.contains(&last) || last.contains("emb") || last == "wpe"
}

/// Whether a path goes through a numbered layer.
pub(super) fn is_in_layer(path: &str) -> bool {
    path.split('.')
        .any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

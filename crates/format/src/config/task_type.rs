//! What the base model is for.

use std::fmt;

/// PEFT's task types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskType {
    /// Sequence classification.
    SeqCls,
    /// Sequence to sequence.
    Seq2SeqLm,
    /// Causal language modelling.
    CausalLm,
    /// Token classification.
    TokenCls,
    /// Question answering.
    QuestionAns,
    /// Feature extraction.
    FeatureExtraction,
}

impl TaskType {
    /// All of them, in PEFT's order.
    pub const ALL: [Self; 6] = [
        Self::SeqCls,
        Self::Seq2SeqLm,
        Self::CausalLm,
        Self::TokenCls,
        Self::QuestionAns,
        Self::FeatureExtraction,
    ];

    /// The name in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SeqCls => "SEQ_CLS",
            Self::Seq2SeqLm => "SEQ_2_SEQ_LM",
            Self::CausalLm => "CAUSAL_LM",
            Self::TokenCls => "TOKEN_CLS",
            Self::QuestionAns => "QUESTION_ANS",
            Self::FeatureExtraction => "FEATURE_EXTRACTION",
        }
    }

    /// The task of a name in the file.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.as_str() == name)
    }
}

impl fmt::Display for TaskType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

//! What kind of adapter a config is for.

use std::fmt;

/// The kinds of adapters that hold trained rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeftType {
    /// `TrainableTokensConfig`: rows alone.
    TrainableTokens,
    /// `LoraConfig` with `trainable_token_indices`: rows beside LoRA's weights.
    Lora,
}

impl PeftType {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::TrainableTokens, Self::Lora];

    /// `peft_type` of the config.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TrainableTokens => "TRAINABLE_TOKENS",
            Self::Lora => "LORA",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The field that holds the token ids.
    pub(crate) fn tokens_field(self) -> &'static str {
        match self {
            Self::TrainableTokens => "token_indices",
            Self::Lora => "trainable_token_indices",
        }
    }
}

impl fmt::Display for PeftType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

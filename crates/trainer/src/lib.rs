//! Trains chosen token rows of Hugging Face checkpoints with differentiable decoders on candle.

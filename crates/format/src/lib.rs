//! Reads and writes PEFT trainable-token adapters and Hugging Face checkpoints.

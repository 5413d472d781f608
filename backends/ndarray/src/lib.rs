//! The ndarray backend of trainable-tokens: the reference, with explicit gradients.

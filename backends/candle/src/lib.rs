//! The candle backend of trainable-tokens: a drop-in Embedding for CPU, CUDA and Metal.

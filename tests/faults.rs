//! The faults of PEFT's Trainable Tokens (0.20.1.dev0 to 0.21.2), one test each: what PEFT does, with its numbers, and
//! what happens here. F1 and F18 are in `faults_cost.rs`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "faults/adapters.rs"]
mod adapters;
#[path = "faults/files.rs"]
mod files;
#[path = "faults/layer.rs"]
mod layer;

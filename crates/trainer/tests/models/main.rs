//! PEFT's cases on whole models.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod case;
mod families;
mod lora;
mod training;
mod whole_models;

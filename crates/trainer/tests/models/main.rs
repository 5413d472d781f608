//! PEFT's cases on whole models.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod accumulation;
mod case;
mod families;
mod groups;
mod lora;
mod training;
mod whole_models;
mod zeros;

//! What the fuzz targets do with their input. A target never fails on data: whatever is read is a value that is
//! written and read again to the same bits, or a typed error of one line.
#![forbid(unsafe_code)]

mod adapter;
mod checkpoint;
mod config;
mod data_lines;
mod index;
mod input;
mod model_config;

// The trainer's parsers of untrusted text, as they are: they know nothing of candle, and so neither do the targets.
#[allow(dead_code, unreachable_pub, clippy::pedantic)]
#[path = "../../crates/trainer/src"]
mod trainer {
    #[path = "data/batch.rs"]
    pub(crate) mod batch;
    #[path = "config/check.rs"]
    mod check;
    #[path = "config/encoder.rs"]
    pub(crate) mod encoder;
    #[path = "data/example.rs"]
    pub(crate) mod example;
    #[path = "config/family.rs"]
    mod family;
    pub(crate) mod json;
    #[path = "config/layers.rs"]
    mod layers;
    #[path = "config/model.rs"]
    pub(crate) mod model;
    #[path = "config/names.rs"]
    mod names;
    #[path = "config/parse.rs"]
    pub(crate) mod parse;
    #[path = "config/rope.rs"]
    mod rope;
}
use trainer::json;

pub use adapter::adapter;
pub use checkpoint::checkpoint;
pub use config::config;
pub use data_lines::data_lines;
pub use index::index;
pub use model_config::model_config;

/// An error is one line for people, whatever the file holds.
fn check_message(message: &str) {
    assert!(!message.is_empty());
    assert!(
        !message.contains(char::is_control),
        "more than one line: {message:?}"
    );
}

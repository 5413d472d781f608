//! `config.json` of the decoders that this crate implements.

mod encoder;
mod model;
mod parse;

use std::path::Path;

pub use encoder::{Activation, EncoderConfig};
pub use model::{ModelConfig, RopeScaling};
use parse::Refusal;

use crate::{Error, Result};

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Config`] for a missing or impossible field, [`Error::UnsupportedModel`] for another
    /// family or a setting that would change the result and is not implemented.
    pub fn read(path: &Path) -> Result<Self> {
        read(path, parse::config)
    }
}

impl EncoderConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    ///
    /// As for [`ModelConfig::read`].
    pub fn read(path: &Path) -> Result<Self> {
        read(path, encoder::config)
    }
}

fn read<T>(path: &Path, parse: impl FnOnce(&[u8]) -> Result<T, Refusal>) -> Result<T> {
    let path = path.to_owned();
    match std::fs::read(&path) {
        Ok(text) => parse(&text).map_err(|refusal| match refusal {
            Refusal::Invalid(reason) => Error::Config { path, reason },
            Refusal::Unsupported { what, hint } => Error::UnsupportedModel { path, what, hint },
        }),
        Err(source) => Err(Error::Read { path, source }),
    }
}

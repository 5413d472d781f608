//! `config.json` of the models that this crate implements.

mod check;
mod encoder;
mod family;
mod model;
mod names;
mod parse;
mod rope;

use std::path::Path;

pub use encoder::EncoderConfig;
pub use model::{Activation, LayerType, ModelConfig, NormKind, Positions, Rope, RopeScaling};
pub(crate) use names::{ProjectionNames, WeightLayout};
use parse::Refusal;

use crate::{Error, Result};

impl ModelConfig {
    /// Reads `config.json`, and from `generation_config.json` beside it, if there is one, which tokens end a text.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Config`] for a missing or impossible field, [`Error::UnsupportedModel`] for another
    /// family or a setting that would change the result and is not implemented.
    pub fn read(path: &Path) -> Result<Self> {
        let mut config = read(path, parse::config)?;
        let generation = path.with_file_name("generation_config.json");
        if generation.exists()
            && let Some(ids) = read(&generation, parse::ends)?
        {
            config.eos_token_ids = ids;
        }
        Ok(config)
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

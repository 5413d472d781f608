//! `config.json` of the models that this crate implements.

mod check;
mod encoder;
mod family;
mod layers;
mod model;
mod names;
mod parse;
mod rope;

use std::path::Path;

pub use encoder::EncoderConfig;
pub use model::{Activation, LayerType, ModelConfig, NormKind, Positions, Rope, RopeScaling};
pub(crate) use names::{ProjectionNames, WeightLayout};
use parse::Refusal;

use crate::{Error, Result, file};

impl ModelConfig {
    /// Reads `config.json`, and from `generation_config.json` beside it, if there is one, which tokens end a text.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::Config`] for a missing or impossible field, [`Error::UnsupportedModel`] for another
    /// family or a setting that would change the result and is not implemented.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &file::read(path)?)
    }

    /// [`read`](Self::read), where the text of `path` was read before.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let mut config = parse::config(text).map_err(|refusal| refusal.of_file(path))?;
        let generation = path.with_file_name("generation_config.json");
        if generation.exists()
            && let Some(ids) =
                parse::ends(&file::read(&generation)?).map_err(|refusal| refusal.of_file(&generation))?
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
        Self::parse(path, &file::read(path)?)
    }

    /// [`read`](Self::read), where the text of `path` was read before.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        encoder::config(text).map_err(|refusal| refusal.of_file(path))
    }
}

impl Refusal {
    /// The error that names the file.
    fn of_file(self, path: &Path) -> Error {
        let path = path.to_owned();
        match self {
            Self::Invalid(reason) => Error::Config { path, reason },
            Self::Unsupported { what, hint } => Error::UnsupportedModel { path, what, hint },
        }
    }
}

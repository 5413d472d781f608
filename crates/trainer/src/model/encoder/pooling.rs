//! How hidden states become the embedding of a sentence, as sentence-transformers does it (Reimers and Gurevych 2019).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{D, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::json::parse_object;
use crate::ops::{mul_frozen, working_dtype};
use crate::{Error, Result, file};

/// Which hidden states are pooled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolingMode {
    /// The mean over the tokens that are no padding.
    #[default]
    Mean,
    /// The first token's.
    Cls,
}

/// How hidden states become the embedding of a sentence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pooling {
    /// Which hidden states are pooled.
    pub mode: PoolingMode,
    /// Whether the embedding is scaled to unit length.
    pub normalizes: bool,
}

/// One line of `modules.json`.
#[derive(Deserialize)]
struct ModuleEntry {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl PoolingMode {
    /// Its name in `1_Pooling/config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
        }
    }
}

impl Pooling {
    /// What a model directory says: `modules.json` and the config of the pooling module that it names. `None` without
    /// `modules.json`; sentence-transformers takes the mean then.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] and [`Error::Config`]; [`Error::UnsupportedModel`] for another module or mode.
    pub fn of_model(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("modules.json");
        if !path.exists() {
            return Ok(None);
        }
        let invalid = |path: &Path, reason: String| Error::Config {
            path: path.to_owned(),
            reason,
        };
        let modules: Vec<ModuleEntry> = serde_json::from_slice(&file::read(&path)?)
            .map_err(|error| invalid(&path, format!("is no list of modules: {error}")))?;
        let mut pooling = Self::default();
        for module in &modules {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" if module.path.is_empty() => {}
                "Normalize" => pooling.normalizes = true,
                "Pooling" => {
                    let path = dir.join(&module.path).join("config.json");
                    let raw = parse_object(&file::read(&path)?)
                        .map_err(|reason| invalid(&path, format!("is no config of a pooling: {reason}")))?;
                    pooling.mode = mode(&raw).map_err(|what| Error::UnsupportedModel {
                        path: path.clone(),
                        what,
                        hint: "a sentence's embedding can be the mean of its tokens or its first token",
                    })?;
                }
                _ => {
                    return Err(Error::UnsupportedModel {
                        path,
                        what: format!(
                            "module '{}' of type '{}'",
                            module.path.escape_debug(),
                            module.kind.escape_debug()
                        ),
                        hint: "a sentence's embedding comes from a transformer in the same directory, a pooling and a norm",
                    });
                }
            }
        }
        Ok(Some(pooling))
    }

    /// The embeddings of sentences `[B, D]`, in `f32` at least, of hidden states `[B, L, D]`, of which each row's first
    /// `lengths` are no padding.
    ///
    /// # Errors
    ///
    /// Candle's errors.
    pub fn pool(&self, hidden: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let (batch, length, _) = hidden.dims3()?;
        let hidden = hidden.to_dtype(working_dtype(hidden.dtype()))?;
        let pooled = match self.mode {
            PoolingMode::Cls => hidden.narrow(1, 0, 1)?.squeeze(1)?,
            PoolingMode::Mean => {
                let share = |held: &usize| {
                    let held = *held;
                    (0..length).map(move |at| if at < held { 1.0 / held as f64 } else { 0.0 })
                };
                let shares: Vec<f64> = lengths.iter().flat_map(share).collect();
                let shares = Tensor::from_vec(shares, (batch, length, 1), hidden.device())?;
                mul_frozen(&hidden, &shares.to_dtype(hidden.dtype())?)?.sum(1)?
            }
        };
        if !self.normalizes {
            return Ok(pooled);
        }
        // As torch's `normalize`: nothing is divided by less than this.
        let norm = pooled.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
        Ok(pooled.broadcast_div(&norm)?)
    }
}

/// The mode that `1_Pooling/config.json` names, in either spelling, or what is not supported.
fn mode(config: &BTreeMap<String, Value>) -> Result<PoolingMode, String> {
    let switched_on = config.iter().filter(|(_, value)| **value == Value::Bool(true));
    let switched_on = switched_on.filter_map(|(name, _)| {
        let name = name.strip_prefix("pooling_mode_")?;
        Some(name.trim_end_matches("_tokens").trim_end_matches("_token"))
    });
    let modes: Vec<&str> = match config.get("pooling_mode") {
        Some(Value::String(mode)) => vec![mode],
        _ => switched_on.collect(),
    };
    match modes.as_slice() {
        ["mean"] => Ok(PoolingMode::Mean),
        ["cls"] => Ok(PoolingMode::Cls),
        other => Err(format!("pooling_mode '{}'", other.join(" and ").escape_debug())),
    }
}

//! What a config says about LoRA's weights.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::pattern::Patterns;
use crate::config::{AdapterConfig, CONFIG_FILE};
use crate::error::{Error, Result, one_line};

/// Fields that change what the weights mean, in ways that are not supported: refused unless null, false or empty.
const REFUSED: [(&str, &str); 11] = [
    ("use_dora", "DoRA has magnitudes of its own"),
    ("use_qalora", "QA-LoRA pools its inputs"),
    ("lora_bias", "biases of LoRA are not merged"),
    ("use_bdlora", "block-diagonal LoRA is not merged"),
    (
        "arrow_config",
        "Arrow routes between experts and cannot be merged",
    ),
    ("kasa_config", "KaSA truncates the base's weights"),
    ("monteclora_config", "MonteCLoRA samples its weights"),
    (
        "alora_invocation_tokens",
        "activated LoRA counts for some positions only and cannot be merged",
    ),
    ("layer_replication", "the base's layers would be replicated"),
    ("megatron_config", "Megatron's layers are sharded"),
    ("target_parameters", "LoRA of bare parameters is not merged"),
];

/// Ways to start LoRA's weights that leave the base as it is.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// How the product of LoRA's weights is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    /// By `alpha / r`.
    ByRank,
    /// By `alpha / sqrt(r)`: rank-stabilised LoRA.
    ByRootOfRank,
}

/// The fields of a `LoraConfig` that its weights are read with, checked.
pub(super) struct Settings {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    ranks: Patterns<usize>,
    alphas: Patterns<f64>,
    scale: Scale,
    /// Whether the base stores its linear weights as `[in, out]`, where their shape does not tell.
    pub(super) fan_in_fan_out: bool,
}

impl Settings {
    /// Reads the fields; `file` is the one that holds the weights.
    pub(super) fn new(config: &AdapterConfig, file: &Path) -> Result<Self> {
        let path = file.with_file_name(CONFIG_FILE);
        let fields = Fields { config, path: &path };
        for (name, why) in REFUSED {
            fields.expect_unset(name, why)?;
        }
        fields.expect_plain_start()?;
        Ok(Self {
            rank: fields.value("r", 8, "an integer above 0", as_rank)?,
            alpha: fields.value("lora_alpha", 8.0, "a number", as_alpha)?,
            ranks: fields.patterns("rank_pattern", "an integer above 0", as_rank)?,
            alphas: fields.patterns("alpha_pattern", "a number", as_alpha)?,
            scale: if fields.value("use_rslora", false, "true or false", Value::as_bool)? {
                Scale::ByRootOfRank
            } else {
                Scale::ByRank
            },
            fan_in_fan_out: fields.value("fan_in_fan_out", false, "true or false", Value::as_bool)?,
            path,
        })
    }

    /// Rank and scaling of the module at `path`.
    pub(super) fn of(&self, path: &str) -> Result<(usize, f64)> {
        let gave_up = |field: &str| {
            let field = field.to_owned();
            move |(pattern, reason): (String, String)| {
                Error::field(&self.path, format!("{field}[{pattern:?}]"), reason)
            }
        };
        let rank = self.ranks.of(path).map_err(gave_up("rank_pattern"))?;
        let alpha = self.alphas.of(path).map_err(gave_up("alpha_pattern"))?;
        let (rank, alpha) = (rank.unwrap_or(self.rank), alpha.unwrap_or(self.alpha));
        let divisor = match self.scale {
            Scale::ByRank => rank as f64,
            Scale::ByRootOfRank => (rank as f64).sqrt(),
        };
        Ok((rank, alpha / divisor))
    }
}

fn as_rank(value: &Value) -> Option<usize> {
    let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok())?;
    (rank > 0).then_some(rank)
}

fn as_alpha(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite())
}

struct Fields<'a> {
    config: &'a AdapterConfig,
    path: &'a Path,
}

impl Fields<'_> {
    fn wrong(&self, field: impl Into<String>, expected: &str, got: &Value) -> Error {
        Error::field(
            self.path,
            field,
            format!("expected {expected}, got {}", brief(got)),
        )
    }

    fn value<T>(
        &self,
        name: &str,
        default: T,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.config.field(name) {
            None => Ok(default),
            Some(value) => read(&value).ok_or_else(|| self.wrong(name, expected, &value)),
        }
    }

    fn patterns<T: Copy>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>> {
        let map = match self.config.field(name) {
            None | Some(Value::Null) => serde_json::Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(self.wrong(name, "an object", &other)),
        };
        let entries = map.into_iter().map(|(pattern, value)| match read(&value) {
            Some(value) => Ok((pattern, value)),
            None => Err(self.wrong(format!("{name}[{pattern:?}]"), expected, &value)),
        });
        Patterns::new(entries.collect::<Result<Vec<_>>>()?).map_err(|(pattern, reason)| {
            let reason = format!("it is not a usable regular expression: {reason}");
            Error::field(self.path, format!("{name}[{pattern:?}]"), reason)
        })
    }

    fn expect_unset(&self, name: &str, why: &str) -> Result<()> {
        let set = match self.config.field(name) {
            None | Some(Value::Null | Value::Bool(false)) => None,
            Some(Value::Array(items)) if items.is_empty() => None,
            Some(Value::Object(fields)) if fields.is_empty() => None,
            other => other,
        };
        match set {
            None => Ok(()),
            Some(value) => Err(Error::Unsupported {
                path: self.path.to_owned(),
                what: format!("{name} is {}: {why}", brief(&value)),
            }),
        }
    }

    /// Some ways to start also take a part out of the base's weights. What such a run saved is to be added to what was
    /// left, not to the base.
    fn expect_plain_start(&self) -> Result<()> {
        const FIELD: &str = "init_lora_weights";
        match self.config.field(FIELD) {
            None | Some(Value::Null | Value::Bool(_)) => Ok(()),
            Some(Value::String(start)) if PLAIN_STARTS.contains(&start.to_lowercase().as_str()) => Ok(()),
            Some(value @ Value::String(_)) => Err(Error::Unsupported {
                path: self.path.to_owned(),
                what: format!(
                    "{FIELD} is {}: such a start changes the base's weights, which the file does not hold; convert the \
                     adapter to plain LoRA, by save_pretrained with path_initial_model_for_weight_conversion",
                    brief(&value)
                ),
            }),
            Some(other) => Err(self.wrong(FIELD, "true, false or a name", &other)),
        }
    }
}

/// A value on one line, shortened if it is long.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = one_line(value);
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

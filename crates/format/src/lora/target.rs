//! Which modules a `LoraConfig` gives weights, as PEFT's `check_target_module_exists` decides it.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::config::{AdapterConfig, CONFIG_FILE, TargetModules, is_path_or_suffix};
use crate::error::{Error, Result, one_line};
use crate::regex;
use crate::table::float_dtype;

/// PEFT's word for all linear layers. It is resolved before an adapter is saved.
const ALL_LINEAR: &str = "all-linear";

/// The rules of a config, compiled.
pub(super) struct LoraTargets {
    path: PathBuf,
    /// `None` if the config does not say, so that the file alone does.
    include: Option<Rule>,
    exclude: Option<Rule>,
    saved: Vec<Regex>,
    layers: Option<Layers>,
}

/// Paths, or the ends of them after a dot; or an expression for whole paths.
enum Rule {
    Names(Vec<String>),
    Pattern(Box<Regex>),
}

/// Numbers of layers, and where in a path they stand.
struct Layers {
    numbers: Vec<u64>,
    places: Vec<Regex>,
}

impl LoraTargets {
    /// Reads the rules; `file` is the one that holds the weights.
    pub(super) fn new(config: &AdapterConfig, file: &Path) -> Result<Self> {
        let path = file.with_file_name(CONFIG_FILE);
        let read = |name: &str| {
            let value = config.field(name).unwrap_or_default();
            rule(&value).map_err(|reason| Error::field(&path, name, reason))
        };
        let include = match config.target_modules() {
            TargetModules::Default => None,
            TargetModules::Pattern(word) if word == ALL_LINEAR => None,
            TargetModules::List(names) => Some(Rule::Names(names.clone())),
            TargetModules::Pattern(_) => read("target_modules")?,
        };
        let saved = regex::compile_all(&saved_modules(config), |name| {
            format!(r"\A(?:|.*\.){name}(?:\z|\..*)")
        });
        let saved = saved.map_err(|(_, reason)| {
            let reason = format!("it is not a usable regular expression: {reason}");
            Error::field(&path, "modules_to_save", reason)
        })?;
        Ok(Self {
            include,
            exclude: read("exclude_modules")?,
            saved,
            layers: layers(config, &path)?,
            path,
        })
    }

    /// Whether the config says which modules have weights at all.
    pub(super) fn are_known(&self) -> bool {
        self.include.is_some()
    }

    /// Whether the module at `path` is saved whole, or lies in one that is.
    pub(super) fn save(&self, path: &str) -> Result<bool> {
        for saved in &self.saved {
            if is_match(saved, path).map_err(|reason| Error::field(&self.path, "modules_to_save", reason))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the module at `path` has weights, as far as the config says.
    pub(super) fn contain(&self, path: &str) -> Result<bool> {
        let matches = |rule: &Option<Rule>, field: &str| match rule {
            None => Ok(None),
            Some(rule) => rule
                .matches(path)
                .map(Some)
                .map_err(|reason| Error::field(&self.path, field, reason)),
        };
        if matches(&self.exclude, "exclude_modules")? == Some(true) || self.save(path)? {
            return Ok(false);
        }
        if matches(&self.include, "target_modules")? == Some(false) {
            return Ok(false);
        }
        match &self.layers {
            None => Ok(true),
            Some(layers) => layers
                .contain(path)
                .map_err(|reason| Error::field(&self.path, "layers_pattern", reason)),
        }
    }
}

impl LoraTargets {
    /// The path of the module whose matrix is stored as `name` in `base`, if it has weights as far as the config says.
    pub(super) fn matrix(&self, base: &Checkpoint, name: &str) -> Result<Option<String>> {
        let Some(path) = name.strip_suffix(".weight") else {
            return Ok(None);
        };
        let path = base.module_name(path);
        let tensor = base.tensor(name)?;
        let is_matrix = tensor.shape.len() == 2 && float_dtype(tensor.dtype).is_some();
        Ok((is_matrix && self.contain(&path)?).then(|| path.into_owned()))
    }
}

/// `modules_to_save`, as far as it is a list of names.
fn saved_modules(config: &AdapterConfig) -> Vec<String> {
    match config.field("modules_to_save") {
        Some(Value::Array(items)) => items
            .iter()
            .filter_map(|item| Some(item.as_str()?.to_owned()))
            .collect(),
        _ => Vec::new(),
    }
}

impl Rule {
    fn matches(&self, path: &str) -> Result<bool, String> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| is_path_or_suffix(name, path))),
            Self::Pattern(regex) => is_match(regex, path),
        }
    }
}

fn rule(value: &Value) -> Result<Option<Rule>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(pattern) if pattern.is_empty() => Ok(None),
        Value::String(pattern) => {
            let whole = regex::compile(pattern, |pattern| format!(r"\A(?:{pattern})\z"));
            let whole = whole
                .map_err(|reason| format!("{pattern:?} is not a usable regular expression: {reason}"))?;
            Ok(Some(Rule::Pattern(Box::new(whole))))
        }
        Value::Array(items) if items.is_empty() => Ok(None),
        Value::Array(items) => {
            let names = items.iter().map(|item| Some(item.as_str()?.to_owned()));
            let names = names.collect::<Option<_>>().ok_or("expected module names")?;
            Ok(Some(Rule::Names(names)))
        }
        _ => Err("expected a list, a string or null".to_owned()),
    }
}

/// `layers_to_transform` and `layers_pattern`; PEFT allows them with a list of modules only.
fn layers(config: &AdapterConfig, path: &Path) -> Result<Option<Layers>> {
    let field = |name: &str| config.field(name).unwrap_or_default();
    let numbers = match field("layers_to_transform") {
        Value::Null => return Ok(None),
        Value::Array(items) if items.is_empty() => return Ok(None),
        Value::Array(items) => items.iter().map(Value::as_u64).collect(),
        other => other.as_u64().map(|number| vec![number]),
    };
    let wrong = |name: &str, reason: &str| Error::field(path, name, reason);
    let numbers: Vec<_> =
        numbers.ok_or_else(|| wrong("layers_to_transform", "expected the numbers of layers"))?;
    if matches!(config.target_modules(), TargetModules::Pattern(_)) {
        return Err(wrong(
            "layers_to_transform",
            "it goes with a list of target_modules only",
        ));
    }
    let names = match field("layers_pattern") {
        Value::Null => Vec::new(),
        Value::String(name) if name.is_empty() => Vec::new(),
        Value::String(name) => vec![name],
        Value::Array(items) => {
            let names = items.iter().map(|item| Some(item.as_str()?.to_owned()));
            let names = names.collect::<Option<Vec<_>>>();
            names.ok_or_else(|| wrong("layers_pattern", "expected names of module lists"))?
        }
        _ => return Err(wrong("layers_pattern", "expected names of module lists")),
    };
    // The first number in a path is that of the layer: later ones may number experts.
    let places = if names.is_empty() {
        regex::compile_all(&[r"\A.*?\.[^.]*\.(?P<number>\d+)\."], str::to_owned)
    } else {
        regex::compile_all(&names, |name| format!(r"\A(?:|.*?\.){name}\.(?P<number>\d+)\."))
    };
    let places = places.map_err(|(_, reason)| {
        let reason = format!("it is not a usable regular expression: {reason}");
        Error::field(path, "layers_pattern", reason)
    })?;
    Ok(Some(Layers { numbers, places }))
}

impl Layers {
    fn contain(&self, path: &str) -> Result<bool, String> {
        for place in &self.places {
            if let Some(captures) = place.captures(path).map_err(one_line)? {
                let number = captures
                    .name("number")
                    .and_then(|found| found.as_str().parse().ok());
                return Ok(number.is_some_and(|number: u64| self.numbers.contains(&number)));
            }
        }
        Ok(false)
    }
}

fn is_match(regex: &Regex, path: &str) -> Result<bool, String> {
    regex.is_match(path).map_err(|error| {
        format!(
            "{:?} is not a usable regular expression: {}",
            regex.as_str(),
            one_line(error)
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::TokenIndices;

    fn targets(fields: &Value) -> Result<LoraTargets> {
        let mut config = AdapterConfig::lora(&TokenIndices::List(Vec::new())).unwrap();
        for (name, value) in fields.as_object().unwrap() {
            config = config.with_field(name, value).unwrap();
        }
        LoraTargets::new(&config, Path::new("adapter_model.safetensors"))
    }

    #[test]
    fn modules_are_targeted_as_peft_does() {
        let q = "model.layers.1.self_attn.q_proj";
        for (fields, path, expected) in [
            (json!({"target_modules": ["q_proj"]}), q, true),
            (json!({"target_modules": ["proj"]}), q, false),
            (json!({"target_modules": r".*\.(q|v)_proj"}), q, true),
            (json!({"target_modules": "q_proj"}), q, false),
            (json!({"target_modules": "all-linear"}), q, true),
            (json!({"target_modules": null}), q, true),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
                q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": "model"}),
                q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}),
                q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}),
                q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "modules_to_save": ["attn"]}),
                q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [1]}),
                q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": 0}),
                q,
                false,
            ),
            (
                json!({"target_modules": ["lm_head"], "layers_to_transform": 0}),
                "lm_head",
                false,
            ),
            (
                json!({"target_modules": ["w1"], "layers_to_transform": [3], "layers_pattern": "experts"}),
                "model.layers.1.experts.3.w1",
                true,
            ),
            (
                json!({"target_modules": ["w1"], "layers_to_transform": [3]}),
                "model.layers.1.experts.3.w1",
                false,
            ),
        ] {
            assert_eq!(
                targets(&fields).unwrap().contain(path).unwrap(),
                expected,
                "{fields}"
            );
        }
    }

    #[test]
    fn rules_that_are_none_are_refused_by_name() {
        for (fields, field) in [
            (json!({"exclude_modules": "(q"}), "exclude_modules"),
            (json!({"exclude_modules": 1}), "exclude_modules"),
            (json!({"target_modules": "(q"}), "target_modules"),
            (json!({"modules_to_save": ["(q"]}), "modules_to_save"),
            (json!({"layers_to_transform": ["a"]}), "layers_to_transform"),
            (
                json!({"target_modules": "a", "layers_to_transform": 1}),
                "layers_to_transform",
            ),
            (
                json!({"layers_to_transform": 1, "layers_pattern": 1}),
                "layers_pattern",
            ),
            (
                json!({"layers_to_transform": 1, "layers_pattern": ["(h"]}),
                "layers_pattern",
            ),
        ] {
            let error = targets(&fields).err().unwrap();
            assert!(error.to_string().contains(&format!(": {field}: ")), "{error}");
        }
    }
}

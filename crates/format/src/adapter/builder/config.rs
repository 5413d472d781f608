//! The config of a new adapter, and whether its modules fit it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::AdapterBuilder;
use crate::adapter::parts::Targets;
use crate::adapter::{AdapterModule, ROWS_FILE};
use crate::config::{AdapterConfig, PeftType, TargetModules, TokenIndices};
use crate::error::{Error, Result};

impl AdapterBuilder {
    /// The config: PEFT's defaults, and what was given.
    pub(super) fn config(&self) -> Result<AdapterConfig> {
        let mut config = match &self.lora {
            None => {
                let target = self.target_modules.clone();
                let target = target.unwrap_or_else(|| TargetModules::List(self.last_parts()));
                let ids = self
                    .modules
                    .first()
                    .map_or(&[][..], |(module, _)| module.token_indices());
                AdapterConfig::new(ids, &target)?
            }
            Some(config) => self.lora_config(config)?,
        };
        if let Some(task) = &self.task_type {
            config = config.with_field("task_type", task)?;
        }
        if let Some(base) = &self.base_model {
            config = config.with_field("base_model_name_or_path", &base.as_str().into())?;
        }
        match self.init_weights {
            Some(keep) if self.lora.is_none() => config.with_field("init_weights", &keep.into()),
            _ => Ok(config),
        }
    }

    fn lora_config(&self, config: &AdapterConfig) -> Result<AdapterConfig> {
        let path = PathBuf::from(ROWS_FILE);
        if config.peft_type() != PeftType::Lora {
            let reason = format!("expected that of a LoRA adapter, got {}", config.peft_type());
            return Err(Error::field(&path, "peft_type", reason));
        }
        let mut config = config.clone();
        if let Some(target) = &self.target_modules {
            config = config.with_target_modules(target)?;
        }
        if config.token_indices().lists().next().is_some() {
            return Ok(config);
        }
        let names = self.last_parts();
        let unique = names.len() == self.modules.len();
        let ids = match self.modules.as_slice() {
            [(module, _)] => TokenIndices::List(module.token_indices.clone()),
            modules => {
                let modules = modules.iter().map(|(module, _)| {
                    let name = if unique {
                        last_part(&module.path)
                    } else {
                        module.path.clone()
                    };
                    (name, module.token_indices.clone())
                });
                TokenIndices::ByModule(modules.collect::<BTreeMap<_, _>>())
            }
        };
        config.with_token_indices(&ids)
    }

    /// The last parts of the modules' paths, each once.
    fn last_parts(&self) -> Vec<String> {
        let mut names = Vec::new();
        for name in self.modules.iter().map(|(module, _)| last_part(&module.path)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Every module must be targeted with its tokens, and no path may occur twice: else the file would be read as
/// something else.
pub(super) fn check_paths<'a>(
    modules: impl Iterator<Item = &'a AdapterModule> + Clone,
    config: &AdapterConfig,
) -> Result<()> {
    let path = PathBuf::from(ROWS_FILE);
    let kind = config.peft_type();
    let field = |name: &str, reason: String| Error::field(&path, name, reason);
    let targets = Targets::of(config, modules.clone().map(AdapterModule::path));
    let target_field = match targets {
        Targets::Modules(_) => "target_modules",
        _ => kind.tokens_field(),
    };
    let mut seen = Vec::new();
    for module in modules {
        for at in module.all_paths() {
            if seen.contains(&at) {
                return Err(field(target_field, format!("module {at:?} is given twice")));
            }
            seen.push(at);
        }
        let contained = targets
            .contain(&module.path)
            .map_err(|reason| field(target_field, reason))?;
        if !contained {
            return Err(field(
                target_field,
                format!("module {:?} is not among them", module.path),
            ));
        }
        if config.token_indices().of(&module.path) != Some(module.token_indices()) {
            let reason = format!("it is not the token ids of module {:?}", module.path);
            return Err(field(kind.tokens_field(), reason));
        }
    }
    Ok(())
}

fn last_part(path: &str) -> String {
    path.rsplit('.').next().unwrap_or(path).to_owned()
}

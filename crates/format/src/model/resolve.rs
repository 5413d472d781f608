//! Which tables of a model an adapter is for.

use super::ModelTables;
use crate::config::{AdapterConfig, Matcher, PeftType, TargetModules, TokenIndices, is_path_or_suffix};
use crate::error::{Error, Result};

/// A table whose rows train.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TargetedTable {
    /// The module's path.
    pub path: String,
    /// Other modules that share its table.
    pub tied: Vec<String>,
    /// The ids of the trained tokens, in slot order.
    pub token_indices: Vec<u32>,
}

impl ModelTables {
    /// The tables that a config targets, as PEFT resolves it: a list by path or dotted end, a string as a regular
    /// expression for the whole path, null as the input embedding, or else `embed_tokens`; with LoRA, the modules that
    /// have token ids. Trainers call it before they start.
    ///
    /// # Errors
    ///
    /// [`Error::NoTarget`] if a target is no module of the model, [`Error::NotATable`] if one is no table,
    /// [`Error::TiedTokens`] if modules that share a table do not have the same tokens, [`Error::Field`] for a pattern
    /// that fails.
    pub fn targets(&self, config: &AdapterConfig) -> Result<Vec<TargetedTable>> {
        let mut found = match (config.peft_type(), config.token_indices()) {
            (PeftType::TrainableTokens, ids) => self.by_target_modules(config.target_modules(), ids)?,
            (PeftType::Lora, ids @ TokenIndices::ByModule(names)) => {
                let unknown = names
                    .keys()
                    .find(|name| !self.paths().any(|path| is_path_or_suffix(name, path)));
                if let Some(name) = unknown {
                    return Err(self.no_target(name.clone()));
                }
                let named = self.paths().filter_map(|path| Some(table(path, ids.of(path)?)));
                named.collect()
            }
            (PeftType::Lora, TokenIndices::List(ids)) => {
                let path = self.input_embedding().or_else(|| self.last_resort());
                let path = path.ok_or_else(|| self.no_target("embed_tokens".to_owned()))?;
                vec![table(path, ids)]
            }
        };
        for target in &found {
            self.check_table(&target.path)?;
        }
        self.tie(&mut found)?;
        Ok(found)
    }

    fn by_target_modules(&self, targets: &TargetModules, ids: &TokenIndices) -> Result<Vec<TargetedTable>> {
        let field = |reason| Error::field(&self.origin, "target_modules", reason);
        let matcher = Matcher::new(targets);
        let mut found = Vec::new();
        for path in self.paths() {
            let is_target = match (targets, self.input_embedding()) {
                (TargetModules::Default, Some(embedding)) => path == embedding,
                // PEFT's last resort is a pattern: the whole path.
                (TargetModules::Default, None) => path == "embed_tokens",
                _ => matcher.matches(path).map_err(field)?,
            };
            if is_target {
                found.push(table(path, ids.of(path).unwrap_or_default()));
            }
        }
        if found.is_empty() {
            let name = match targets {
                TargetModules::List(entries) => entries.join(" or "),
                TargetModules::Pattern(pattern) => pattern.clone(),
                TargetModules::Default => "embed_tokens".to_owned(),
            };
            return Err(self.no_target(name));
        }
        Ok(found)
    }

    /// The one module that ends in the name that PEFT falls back to.
    fn last_resort(&self) -> Option<&str> {
        let mut named = self
            .paths()
            .filter(|path| is_path_or_suffix("embed_tokens", path));
        named.next().filter(|_| named.next().is_none())
    }

    /// Makes one table of those that are tied. They must have the same tokens, and the input embedding must be among
    /// them: rows of the head alone would be merged into the embedding's table.
    fn tie(&self, found: &mut Vec<TargetedTable>) -> Result<()> {
        let Some(embedding) = self.input_embedding().filter(|_| !self.tied.is_empty()) else {
            return Ok(());
        };
        let shared = |target: &TargetedTable| self.shares_input_embedding(&target.path);
        let Some(owner) = found.iter().find(|target| target.path == embedding).cloned() else {
            return match found.iter().find(|target| shared(target)) {
                None => Ok(()),
                Some(head) => Err(self.tied_tokens(embedding, &head.path)),
            };
        };
        let differs = |target: &&TargetedTable| shared(target) && target.token_indices != owner.token_indices;
        if let Some(other) = found.iter().find(differs) {
            return Err(self.tied_tokens(embedding, &other.path));
        }
        found.retain(|target| target.path == embedding || !shared(target));
        for target in found.iter_mut().filter(|target| target.path == embedding) {
            target.tied.clone_from(&self.tied);
        }
        Ok(())
    }

    fn tied_tokens(&self, first: &str, second: &str) -> Error {
        Error::TiedTokens {
            path: self.origin.clone(),
            first: first.to_owned(),
            second: second.to_owned(),
        }
    }

    fn no_target(&self, target: String) -> Error {
        let tables = self.paths().filter(|path| self.check_table(path).is_ok());
        let tables: Vec<_> = tables.take(4).map(str::to_owned).collect();
        Error::NoTarget {
            path: self.origin.clone(),
            target,
            tables,
        }
    }
}

fn table(path: &str, ids: &[u32]) -> TargetedTable {
    TargetedTable {
        path: path.to_owned(),
        tied: Vec::new(),
        token_indices: ids.to_vec(),
    }
}

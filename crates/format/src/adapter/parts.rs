//! Which stored rows belong to which module, and whether everything fits together.

use std::path::Path;

use trainable_tokens_core::TokenRows;

use super::key::key_of;
use super::{Adapter, AdapterModule};
use crate::config::{
    AdapterConfig, CONFIG_FILE, Matcher, PeftType, TargetModules, TokenIndices, is_path_or_suffix,
};
use crate::error::{Error, Result};

/// Sorts stored rows by module: those of targeted modules stand for themselves; all others are copies for modules
/// tied to one of them, and must equal its rows bit for bit.
pub(super) fn group(
    mut stored: Vec<(String, TokenRows)>,
    config: &AdapterConfig,
    path: &Path,
) -> Result<Vec<AdapterModule>> {
    let kind = config.peft_type();
    // Whatever order they come in, the result is that of the file.
    stored.sort_by_cached_key(|(module, _)| key_of(kind, module));
    let targets = Targets::of(config, stored.iter().map(|(module, _)| module.as_str()));
    let mut modules = Vec::new();
    let mut copies = Vec::new();
    for (module, rows) in stored {
        if targets
            .contain(&module)
            .map_err(|reason| target_error(path, reason))?
        {
            modules.push(AdapterModule {
                token_indices: ids_of(config, &module, path)?,
                path: module,
                tied_paths: Vec::new(),
                rows,
            });
        } else {
            copies.push((module, rows));
        }
    }
    if modules.is_empty() && !(targets.may_be_none() && copies.is_empty()) {
        return Err(no_target(&copies, &targets, kind, path));
    }
    for (module, rows) in copies {
        match modules.iter_mut().find(|target| target.rows.bits_eq(&rows)) {
            Some(target) => target.tied_paths.push(module),
            None => return Err(tied_copies_differ(&modules, &module, &rows, kind, path)),
        }
    }
    check_names(config, &modules, path)?;
    Ok(modules)
}

/// What a config says about which modules have rows.
pub(super) enum Targets<'a> {
    /// Those that `target_modules` targets.
    Modules(Matcher<'a>),
    /// Those that have token ids.
    Named(&'a TokenIndices),
    /// The model's input embedding: this one, as far as names tell.
    InputEmbedding(Option<String>),
}

impl<'a> Targets<'a> {
    /// Of a config for a model of which these modules are known, in the order of the file.
    pub(super) fn of<'p>(config: &'a AdapterConfig, modules: impl Iterator<Item = &'p str>) -> Self {
        match (config.peft_type(), config.token_indices()) {
            (PeftType::TrainableTokens, _) if *config.target_modules() != TargetModules::Default => {
                Self::Modules(Matcher::new(config.target_modules()))
            }
            (PeftType::Lora, ids @ TokenIndices::ByModule(_)) => Self::Named(ids),
            _ => Self::InputEmbedding(input_embedding(modules)),
        }
    }

    /// Whether the module at `path` has rows of its own.
    pub(super) fn contain(&self, path: &str) -> Result<bool, String> {
        match self {
            Self::Modules(targets) => targets.matches(path),
            Self::Named(ids) => Ok(ids.of(path).is_some()),
            Self::InputEmbedding(module) => Ok(module.as_deref() == Some(path)),
        }
    }

    /// A LoRA adapter need not train tokens.
    fn may_be_none(&self) -> bool {
        matches!(self, Self::Named(TokenIndices::ByModule(modules)) if modules.is_empty())
    }
}

/// PEFT asks the model for its input embedding; without the model, the usual name tells, or else the first module.
fn input_embedding<'p>(modules: impl Iterator<Item = &'p str>) -> Option<String> {
    let modules: Vec<_> = modules.collect();
    let usual = Matcher::new(&TargetModules::Default);
    let usual = modules.iter().find(|path| usual.matches(path) == Ok(true));
    usual.or(modules.first()).map(|path| (*path).to_owned())
}

fn target_error(path: &Path, reason: String) -> Error {
    Error::field(
        path.with_file_name(CONFIG_FILE).as_path(),
        "target_modules",
        reason,
    )
}

/// The ids of a targeted module. Two names in the config may both mean it only if they say the same.
fn ids_of(config: &AdapterConfig, module: &str, path: &Path) -> Result<Vec<u32>> {
    let ids = config.token_indices();
    let mut entries = ids.entries_for(module);
    if let Some((first, list)) = entries.next()
        && let Some((second, _)) = entries.find(|(_, other)| *other != list)
    {
        let reason =
            format!("{first:?} and {second:?} both mean module {module:?}, with different token ids");
        let path = path.with_file_name(CONFIG_FILE);
        return Err(Error::field(&path, config.peft_type().tokens_field(), reason));
    }
    Ok(ids.of(module).unwrap_or_default().to_vec())
}

/// A named module may only be without rows if it can be tied to one with the same ids: PEFT saves those rows once.
fn check_names(config: &AdapterConfig, modules: &[AdapterModule], path: &Path) -> Result<()> {
    for (name, ids) in names_without_rows(config, modules) {
        if !modules.iter().any(|module| module.token_indices == ids) {
            return Err(Error::TensorMissing {
                path: path.to_owned(),
                tensor: key_of(config.peft_type(), name),
                hint: format!(", though {} names {name:?}", config.peft_type().tokens_field()),
            });
        }
    }
    Ok(())
}

/// The names that have token ids, but no rows of their own.
pub(super) fn names_without_rows<'a>(
    config: &'a AdapterConfig,
    modules: &'a [AdapterModule],
) -> impl Iterator<Item = (&'a str, &'a [u32])> {
    let named = match config.token_indices() {
        TokenIndices::List(_) => None,
        TokenIndices::ByModule(named) => Some(named),
    };
    let has_rows = move |name: &str| modules.iter().any(|module| is_path_or_suffix(name, &module.path));
    named
        .into_iter()
        .flatten()
        .filter(move |(name, _)| !has_rows(name))
        .map(|(name, ids)| (name.as_str(), ids.as_slice()))
}

fn no_target(copies: &[(String, TokenRows)], targets: &Targets<'_>, kind: PeftType, path: &Path) -> Error {
    let input_embedding = || ("embed_tokens".to_owned(), "of the model's input embedding");
    let (module, hint) = match targets {
        Targets::Modules(matcher) => match matcher.targets() {
            TargetModules::List(entries) => (entries.join(" or "), "of target_modules"),
            TargetModules::Pattern(pattern) => (pattern.clone(), "of target_modules"),
            TargetModules::Default => input_embedding(),
        },
        Targets::Named(TokenIndices::ByModule(names)) if !names.is_empty() => {
            let names: Vec<_> = names.keys().map(String::as_str).collect();
            (names.join(" or "), "of trainable_token_indices")
        }
        Targets::Named(_) => ("<none>".to_owned(), "to expect without trainable_token_indices"),
        Targets::InputEmbedding(_) => input_embedding(),
    };
    let have: Vec<_> = copies.iter().map(|(module, _)| module.as_str()).collect();
    let have = if have.is_empty() {
        "no module".to_owned()
    } else {
        format!("only {have:?}")
    };
    Error::TensorMissing {
        path: path.to_owned(),
        tensor: key_of(kind, &module),
        hint: format!(" {hint}; the file holds rows for {have}"),
    }
}

/// Names the two copies, and the first row in which they differ.
pub(super) fn tied_copies_differ(
    modules: &[AdapterModule],
    copy: &str,
    rows: &TokenRows,
    kind: PeftType,
    path: &Path,
) -> Error {
    let like = modules
        .iter()
        .find(|target| target.rows.shape() == rows.shape() && target.rows.dtype() == rows.dtype())
        .or(modules.first());
    let (first, row) = like.map_or(("", 0), |target| {
        (target.path(), first_different_row(&target.rows, rows))
    });
    Error::TiedCopies {
        path: path.to_owned(),
        first: key_of(kind, first),
        second: key_of(kind, copy),
        row,
    }
}

/// The number of the first row in which two tables differ.
pub(crate) fn first_different_row(a: &TokenRows, b: &TokenRows) -> usize {
    // Of no rows, a file can claim any length.
    let row_bytes = a.embedding_dim().saturating_mul(a.dtype().size_in_bytes()).max(1);
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let rows = a.chunks(row_bytes).zip(b.chunks(row_bytes));
    rows.take_while(|(a, b)| a == b).count()
}

impl Adapter {
    /// Checks what every adapter must be, however it was made.
    pub(super) fn checked(self) -> Result<Self> {
        for module in &self.modules {
            let [rows, columns] = module.rows.shape();
            let expected = module.token_indices.len();
            if rows != expected {
                return Err(Error::TensorShape {
                    path: self.origin().to_owned(),
                    tensor: key_of(self.config.peft_type(), &module.path),
                    expected: format!(
                        "[{expected}, {columns}], one row for each of {}",
                        self.config.peft_type().tokens_field()
                    ),
                    got: vec![rows, columns],
                });
            }
        }
        self.metadata.check(&self)?;
        Ok(self)
    }
}
